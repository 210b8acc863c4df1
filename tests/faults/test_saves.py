"""SIGKILL while a checkpoint is written, at any moment: what can be restored afterwards."""

import random
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from running import cases, same_bits

from vlkd_jax.checkpoint import Checkpoints

WRITER = """
import sys
import jax, jax.numpy as jnp
from vlkd_jax.checkpoint import Checkpoints
make = jax.jit(lambda step: {"params": jax.random.bits(jax.random.key(step), (1_000_000,)), "step": step})
checkpoints = Checkpoints(sys.argv[1], keep=2)
step = (checkpoints.latest() or 0) + 1
while True:
    checkpoints.save(step, make(jnp.int32(step)), {"step": step})
    checkpoints.wait()
    print(step, flush=True)
    step += 1
"""


@jax.jit
def make(step):
    return {"params": jax.random.bits(jax.random.key(step), (1_000_000,)), "step": step}


@cases(4, 100)
def test_sigkill_during_a_save_leaves_a_complete_step(tmp_path, case):
    """A loop of saves, and after a kill another one over what the first left."""
    chance, sharding = random.Random(case), SingleDeviceSharding(jax.devices()[0])
    like = jax.eval_shape(make, jnp.int32(0))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    for _ in range(2):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
        complete = int(writer.stdout.readline())
        time.sleep(chance.uniform(0.0, 0.3))
        writer.kill()
        complete = max([complete, *map(int, writer.stdout.read().split())])
        writer.wait()
        step, state, meta = Checkpoints(tmp_path).restore(like)
        assert complete <= step <= complete + 1 and meta == {"step": step}
        same_bits(state, make(jnp.int32(step)))
