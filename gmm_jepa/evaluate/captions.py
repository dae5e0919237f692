"""What the report says under its pictures: what is drawn, and what is normal."""

TITLES = {
    "losses": "Parts of the loss and lambda over the steps",
    "meters": "Collapse meters over the steps",
    "optimisation": "Gradient norm, learning rate and speed over the steps",
    "mixture_fit": "Log-likelihood of the mixture over the iterations of EM",
    "cluster_usage": "Share of frames in each cluster, sorted",
    "transitions": "Probability of the next frame's cluster",
    "layer_weights": "Weights of the layers in z",
    "embedding": "Held-out frames on the first two principal axes",
}

CAPTIONS = {
    "losses": (
        "<b>Normal:</b> the KL falls steeply at first and goes on falling, more slowly as λ "
        "releases it. In anchored runs the JEPA error falls, then rises as the teacher's scale "
        "grows: by itself that is no failure. λ ends above zero; without a residual anchor the "
        "representation drifts."
    ),
    "meters": (
        "Measured on training frames. <b>Normal:</b> usage entropy climbs above 0.8 and stays "
        "there, agreement climbs, the mean cosine falls towards 0.1. <b>A collapse</b> shows as a "
        "standard deviation near 0, a mean cosine near 1 and a falling usage entropy, at the front "
        "end or at the output; a dashed line marks the step at which the alarm went off. Effective "
        "rank is a meter, not a verdict: an untrained network has the highest."
    ),
    "optimisation": (
        "A gradient norm that grows for long asks for a lower learning rate. Speed dips where "
        "data is waited for or checkpoints are written."
    ),
    "mixture_fit": (
        "<b>Normal:</b> it flattens within some tens of iterations and never falls, but where an "
        "unused component is seeded again. Of a fit in one pass every point is another mini-batch, "
        "and they scatter. Held-out frames may lie below, far below for voices unlike those it was "
        "fitted on."
    ),
    "cluster_usage": (
        "<b>Normal:</b> the head follows its targets. Clusters that belong to voices which are "
        "not held out stay unused here. A head that breaks off far before the targets has lost "
        "clusters. The dot is the rarest cluster that occurs."
    ),
    "transitions": (
        "The head's commonest clusters, ordered so that those which follow one another lie close. "
        "<b>Normal:</b> a bright diagonal (sounds last longer than a frame) and a few bright "
        "neighbours. One bright column would be a collapse."
    ),
    "layer_weights": (
        "Mean over held-out utterances; z is the weighted sum of the layers. Weights start near "
        "equal; a layer whose weight comes near 1 leaves nothing for the others to add."
    ),
    "embedding": (
        "Two of many dimensions: clouds that overlap here may be apart elsewhere. Colours are "
        "classes of phones where the audio has phone labels, else clusters of the mixture. "
        "<b>Normal:</b> mixed before training, regions of one colour after it. The axes are those "
        "of each panel's own data."
    ),
}

ALARMS = (
    "The step at which two lines in a row were past a threshold, once for every meter; the "
    "thresholds come from collapses made on purpose. An alarm says where to look: the KL and a "
    "probe decide."
)

PROBES = (
    "One linear layer on frozen features, with the same budget for every row. Trained features "
    "are worth something where they beat the same encoder at random initialisation; raw log-mel, "
    "alone and with three frames each side, shows how far one gets without any encoder. ± is one "
    "standard error over utterances; two speakers, or two seeds, differ by more. Utterances of the "
    "training corpus, which pretraining heard without their labels, are counted under each table: "
    "on them an accuracy is not held out."
)

EXAMPLES = (
    "Held-out speech. Below the spectrogram, the most probable component of the mixture and the "
    "cluster head's choice, frame by frame; one colour is one cluster, and clusters that sound "
    "alike have similar colours. <b>Normal:</b> the head's band repeats the mixture's, with steady "
    "runs in vowels and pauses. The mixture's entropy is low nearly everywhere (its posteriors are "
    "almost hard); the head is unsure at the changes."
)
