"""`sdc tune`: the fastest way to draw, with one of some bundles, that keeps to a budget, as a preset in a copy of it.

Types, in the order in which they come about:

- `Budget` (budget.py): what of the pictures is limited: the change of the Fréchet distance to real pictures, or PSNR.
- `Candidate` (candidates.py): a bundle whose ways are searched.
- `Choice` (choices.py): one value on each axis: a course (sampler and steps), a guidance scale, the guided part of the
  steps, a schedule of DeepCache. A `Space` holds the values that a bundle can do, and makes a `Way` of a choice.
- `Way` (engines/preset.py): what the runtime is told: the arguments of a pipeline's call.
- `Measurement` (search.py; measure.py makes them): a bundle's pictures, drawn in a way, against the reference's at
  equal prompts and seeds, and its time beside the reference's, pictures of both drawn in turn. The reference is drawn
  by one bundle for all: the one of ``--reference``, or the first.
- `Tuning` (tune.py): all measurements, and the `Preset` that goes into the manifest of a copy of the chosen bundle.

The flow for each bundle (search.py), with ever more pictures for ever fewer ways:

1. Every value of every axis alone, all else as the reference has it, on few pictures. A value that by itself leaves the
   budget, but for noise, is in no combination.
2. Combinations of the others, the fastest first, as far as times multiply and errors add up. They are measured on
   some pictures, a few at a time, until some are within the budget, but for noise.
3. What is within the budget so far, the fastest first, on all pictures, until one is.

So the preset is the fastest of those, of all bundles, that were measured on all pictures and keep to the budget; what
was ruled out by 1 and 2 was ruled out by fewer pictures. A bundle that draws the
reference keeps to the budget always, with the reference's way.
"""
