"""Fine-tuning a student on questions about pictures: `vlkd train --config=answer --config.start=EXPORT ...`

The files are VQA v2's: --config.data.questions=v2_OpenEnded_mscoco_train2014_questions.json,
--config.data.annotations=v2_mscoco_train2014_annotations.json, --config.data.images=train2014.
"""

from ml_collections import ConfigDict

from vlkd_jax.configs import caption


def get_config() -> ConfigDict:
    config = caption.get_config()
    config.objective = "answer"
    config.data.source = "questions"
    config.data.source_length = 48
    config.data.text_length = 48
    return config
