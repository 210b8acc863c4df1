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
