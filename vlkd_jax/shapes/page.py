"""The fixed part of the report: its words and its style. `vlkd_jax.shapes.report` fills the `$names` in."""

from string import Template

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>VLKD on the built-in world: report</title>
<style>$style</style>
</head>
<body>
<main>
<h1>Vision-language knowledge distillation on the built-in world</h1>
<section class="words">
<div>
$story
<p class="note">$world</p>
</div>
$sample
</section>

<section>
<h2>Questions about pictures</h2>
<figure>
$bars
<figcaption>Answers right by type of question. Whiskers: 95% intervals, where there is one; the figures are in the
table.</figcaption>
</figure>
<table>
<thead><tr><th scope="col">right answers</th><th scope="col">before</th><th scope="col">after</th>
<th scope="col">after, picture taken away</th><th scope="col">most frequent answer</th></tr></thead>
<tbody>$vqa_table</tbody>
</table>
<p class="note">An answer counts when it equals the right one, but for case, punctuation and articles. Small print: 95%
intervals by bootstrap over pictures ($resamples resamples; all questions about one picture stay together); where every
answer scored the same, the interval shrinks to a point and says little. Most frequent answer: what always giving the
answer that is right most often for this type of question would score, counted on these very questions. The words of a
question alone can be worth more: one about a relation names its two possible answers.</p>
<h3>Kinds of object that training saw, and kinds it never saw</h3>
<table>
<thead><tr><th scope="col">right answers after distillation</th><th scope="col">kinds never seen</th>
<th scope="col">kinds seen in training</th></tr></thead>
<tbody>$kinds_table</tbody>
</table>
<p class="note">A kind is a size, a color and a shape. Every picture above holds an object of a kind that no training
picture shows; the right column asks as many questions about other new pictures, whose objects are all of kinds that
training saw. How many objects there are and whether one is there stay close to what can be guessed in both columns:
question and picture meet only in the decoder, which compares nothing that the encoder has not compared before.</p>
</section>

<section>
<h2>Captions, text and retrieval</h2>
<table>
<thead><tr><th scope="col">figure</th><th scope="col">before</th><th scope="col">after</th>
<th scope="col">CLIP’s own text tower</th></tr></thead>
<tbody>$other_table</tbody>
</table>
<p class="note">Attribute F1 weighs the sizes, colors, shapes and places that a caption names against those on the
picture. After distillation the captions of $captioned pictures are $distinct different texts. Text-only questions are
answered from a written description: the ability that distillation should leave alone. Retrieval: how often the picture
nearest to a complete caption, by the cosine of their embeddings, is its own, among all the pictures; beside it what the
teacher reaches with its own text tower, which the student learned from.</p>
</section>

<section>
<h2>Examples: questions</h2>
<p class="note">Picked by rule: of each type of question the first one answered right and the first one answered wrong,
in the order they were asked; so the share of wrong ones shown here says nothing about the score.</p>
$questions
</section>

<section>
<h2>Examples: captions</h2>
<p class="note">Picked by rule: the first $caption_count captions that are right in every detail and the first
$caption_count that are not, in the order of the pictures.</p>
$captions
</section>

<section>
<h2>Training</h2>
<h3>Losses</h3>
$losses
<p class="note">Points: the loss of single batches as it was logged. Line: their running mean over $smoothing logged
points. Squares: held-out pairs, the same ones each time. Axes are linear.</p>
<h3>What became of the text abilities</h3>
$retention
<p class="note">Measured on held-out texts without any picture. Losses can fall while these abilities go, so they are
watched apart.</p>
$unreadable
</section>

<section>
<h2>How this was made</h2>
<dl class="made">$circumstances</dl>
</section>
</main>
</body>
</html>
""")

STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #595959; --line: #d9d9d9; --right: #00507d; --wrong: #8f3a00; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
main { max-width: 1040px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h1, h2, h3, h4, th { overflow-wrap: normal; }
h4 small { font-weight: normal; color: var(--soft); margin-left: .4rem; }
p { margin: .5rem 0; max-width: 44rem; }
.note, figcaption, .none { color: var(--soft); font-size: .875rem; }
.note { max-width: 48rem; }
.words { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start; }
.words > div { flex: 1 1 28rem; max-width: 44rem; }
.sample { margin: .5rem 0; width: 216px; }
.sample .scene { width: 216px; height: 216px; margin-bottom: .4rem; }
figure { margin: 1rem 0; }
figure img:not(.scene), .panels img { display: block; width: 100%; height: auto; }
.beside { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: center; }
figure.beside img { width: 360px; max-width: 100%; }
.beside figcaption { flex: 1 1 16rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 1rem; }
.panels img { max-width: 420px; }
table { border-collapse: collapse; width: 100%; max-width: 52rem; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  line-height: 1.35; }
td { white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { font-size: .875rem; color: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 600; }
td:nth-child(3):not(:last-child) { font-weight: 700; }
td small, tbody th small { display: block; font-size: .78rem; font-weight: normal; color: var(--soft); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem; }
.card { display: flex; gap: .9rem; padding: .75rem; border: 1px solid var(--line); border-left: 5px solid var(--right);
  border-radius: 4px; background: #fbfbfb; margin-bottom: .75rem; }
.card.wrong { border-left: 5px double var(--wrong); background: #fff9f4; }
.card > div { flex: 1; min-width: 0; }
.scene { width: 144px; height: 144px; flex: none; image-rendering: pixelated; border-radius: 2px; }
.card .badge { font-weight: 700; font-size: .9rem; color: var(--right); }
.card.wrong .badge { color: var(--wrong); }
.card p { margin: 0 0 .35rem; line-height: 1.4; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .75rem; margin: 0; font-size: .9rem;
  line-height: 1.4; }
dt { color: var(--soft); }
dd { margin: 0; }
.made { gap: .3rem 1.25rem; }
@media (max-width: 719px) {
  main { padding: 1rem .75rem 2rem; }
  h1 { font-size: 1.35rem; }
  .pair { grid-template-columns: 1fr; gap: 0; }
  table { font-size: .875rem; }
  th, td { padding: .35rem .25rem; }
  thead th, td small, tbody th small { font-size: .72rem; }
  .card .scene { width: 108px; height: 108px; }
  .made { grid-template-columns: 1fr; gap: 0; }
  .made dd { margin-bottom: .5rem; }
}
"""
