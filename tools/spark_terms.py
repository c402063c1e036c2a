"""What spark should know about words: number formats, cache formats and the vocabulary around them, as data.

A `Term` has names and facets; every facet is asked for in many ways by `FACETS`. The text must be true of qrun.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """A thing with `names` (the first is the proper one) and facets: is, when, use, good, bits, why."""

    names: tuple[str, ...]
    facets: dict[str, str]
    example: str = ""


FACETS: dict[str, tuple[str, ...]] = {
    "is": (
        "$what X", "what does X mean", "X?", "X", "what is X {good for|for|about}", "$what X in qrun", "meaning of X",
        "{so|and} what is X", "what is {this|that} X {thing|you mention|i read about}",
        "i {read|heard|saw} the word X, what is it",
        "what {is meant|do you mean} by X", "X means what", "what X is", "do you know what X is", "how does X work",
        "how does X work in qrun", "what exactly is X", "{a|the} definition of X", "tell me more about X", "info on X",
    ),
    "when": (
        "when {should|do|would} i use X", "{should|shall} i use X", "is X {a good choice|right for me|a good idea|"
            "worth it|useful}",
        "when is X {useful|the right choice|good|better|best}", "{why use|why would i use|why should i use|why "
            "choose} X",
        "what is X good for", "who needs X", "when to use X", "do you recommend X",
        "{what's|what is} the {advantage|point|benefit} of X",
    ),
    "use": (
        "$how use X", "$how {turn on|enable|select|choose|get|switch to|set} X",
        "what is the {flag|option|switch} for X",
        "{command|flag|option} for X", "which {flag|option} {is|gives|selects|means} X",
        "$how $run $model {with|in|as} X",
        "$can use X", "{give me|show me} an example {of|with|for} X", "how is X {used|selected|turned on|written}",
        "$how load $model {with|in|as} X", "$how chat with $model in X", "X flag", "X command", "X option",
    ),
    "good": (
        "how {good|accurate|precise|exact} is X", "{does|will} X {lose|hurt|reduce|change|cost} {quality|accuracy|"
            "precision}",
        "what does X {cost|lose}", "is X {accurate|good|lossless|safe|precise|bad}",
        "how much {quality|accuracy} {do i lose|is lost} with X",
        "{what are the|any} {downsides|drawbacks|disadvantages|risks} of X", "is the quality of X {ok|good|fine|bad}",
        "quality of X",
        "what is the {trade-off|tradeoff|catch} {with|of} X", "does X make {the model|answers} worse",
    ),
    "bits": (
        "how {big|large|small} is X", "how many bits {is|does|has|per weight is} X",
        "how many bits {a|per} {weight|value} {does|has|is} X {need|use|take|}",
        "{size|bits|memory} of X", "how much {memory|space|ram} does X {need|use|take|save}", "how much smaller is X",
        "bits per weight of X", "how {compact|heavy} is X", "what is the size of X", "how much does X save",
    ),
}  # fmt: skip

FORMATS = (
    Term(("bf16", "bfloat16", "BF16", "16 bit", "w16a16c16"), {
        "is": "BF16 is the 16-bit floating point format that most checkpoints come in. In qrun it is the reference: "
            "nothing is quantized.",
        "when": "Use BF16 when the model fits in memory, or to compare a smaller recipe against it.",
        "use": "BF16 is what you get without a precision flag: `qrun chat DIR`. You can also write `--quant bf16`.",
        "good": "BF16 is the reference. The other formats are measured against it.",
        "bits": "BF16 takes 16 bits a weight, so 2 GB for each billion parameters."}, "qrun chat DIR --quant bf16"),
    Term(("wint8", "int8 weights", "8 bit weights", "8-bit weights", "w8a16", "--wint8", "WINT8", "W8A16C16"), {
        "is": "wint8 stores the weights as 8-bit integers with one scale per output channel. Activations stay in 16 "
            "bits.",
        "when": "Use wint8 when you want half the size of BF16 and almost the same answers.",
        "use": "Add `--wint8`: `qrun chat DIR --wint8`.",
        "good": "wint8 is very close to BF16: you will rarely see a difference.",
        "bits": "wint8 takes 8 bits a weight, about 1 GB for each billion parameters. That is half of BF16."},
        "qrun chat DIR --wint8"),
    Term(("wint4", "int4 weights", "4 bit weights", "4-bit weights", "--wint4", "WINT4", "w4a16",
    "4-bit quantization", "W4A16C16"), {
        "is": "wint4 stores the weights in 4 bits, in groups of 64 with a scale and a zero point, found by a search "
            "that minimises the error.",
        "when": "Use wint4 when the model must be small: it has the best size for a small loss of quality.",
        "use": "Add `--wint4`: `qrun chat DIR --wint4`.",
        "good": "wint4 loses a little quality. The error-minimising search keeps the loss small; use wint8 if you "
            "need more.",
        "bits": "wint4 takes about 4.4 bits a weight, with its scales and zero points. That is about 3.6 times "
            "smaller than BF16."},
        "qrun chat DIR --wint4"),
    Term(("W4@channel", "channel-wise int4", "fastdeploy's int4", "w4@channel", "fastdeploy wint4"), {
        "is": "`W4@channel` is FastDeploy's 4-bit scheme: one scale per output channel, the largest value divided by "
            "7.",
        "when": "Use `W4@channel` to match FastDeploy exactly. For better answers use the default wint4.",
        "use": "Write `--quant W4@channel`: `qrun chat DIR --quant W4@channel`.",
        "good": "`W4@channel` loses more than the default wint4, because one scale serves a whole channel.",
        "bits": "`W4@channel` takes 4 bits a weight and one scale per channel."}, "qrun chat DIR --quant W4@channel"),
    Term(("W4g32", "W4g128", "group size", "groups of 64", "the group size", "W4g64"), {
        "is": "The group size is how many weights share a scale. `W4g64` means 4-bit weights in groups of 64, and 64 "
            "is the default.",
        "when": "Take a smaller group such as `W4g32` for quality, and a larger one such as `W4g128` for size.",
        "use": "Write the group after the type: `--quant W4g32` or `--quant W4g128`.",
        "good": "A smaller group follows the weights more closely, so it loses less quality but needs more scales.",
        "bits": "Smaller groups need more bits, because there are more scales to store. W4g64 takes about 4.4 bits a "
            "weight."},
        "qrun chat DIR --quant W4g32"),
    Term(("fp8", "--fp8", "FP8", "block_wise_fp8", "float8", "8 bit floats", "e4m3"), {
        "is": "fp8 stores the weights as 8-bit floats (e4m3) in blocks of 128x128, each with its own scale. "
            "Activations are fp8 too.",
        "when": "Use fp8 when you want half the size of BF16. On this CPU release wint8 is a good choice too.",
        "use": "Add `--fp8`: `qrun chat DIR --fp8`.",
        "good": "fp8 is close to BF16. The scales of the 128x128 blocks keep the error small.",
        "bits": "fp8 takes 8 bits a weight, about 1 GB for each billion parameters."}, "qrun chat DIR --fp8"),
    Term(("w8a8", "W8A8", "int8 activations", "W8A8C16"), {
        "is": "w8a8 means 8-bit integer weights and 8-bit integer activations. The activations are scaled for each "
            "token as it runs.",
        "when": "Use w8a8 when long prompts should be read fast: both sides of the product are int8.",
        "use": "Write `--quant w8a8`: `qrun chat DIR --quant w8a8`.",
        "good": "w8a8 loses a little more than wint8, because the activations are rounded as well.",
        "bits": "w8a8 takes 8 bits a weight, half of BF16."}, "qrun chat DIR --quant w8a8"),
    Term(("nf4", "NF4", "normal float", "WNF4"), {
        "is": "nf4 is a 4-bit codebook: 16 levels placed where normally distributed weights are most common.",
        "when": "Use nf4 to compare with other tools that use it. Otherwise wint4 is the better start.",
        "use": "Write `--quant nf4`: `qrun chat DIR --quant nf4`.",
        "good": "nf4 is about as accurate as other 4-bit formats: a small loss.",
        "bits": "nf4 takes 4 bits a weight plus its scales."}, "qrun chat DIR --quant nf4"),
    Term(("mxfp4", "MXFP4"), {
        "is": "mxfp4 stores 4-bit floats in blocks of 32 that share a power-of-two scale.",
        "when": "Use mxfp4 to try that format on your model. For the best 4-bit quality start with wint4.",
        "use": "Write `--quant mxfp4`: `qrun chat DIR --quant mxfp4`.",
        "good": "mxfp4 loses more than wint4, because its scales can only be powers of two.",
        "bits": "mxfp4 takes 4.25 bits a weight."}, "qrun chat DIR --quant mxfp4"),
    Term(("nvfp4", "NVFP4"), {
        "is": "nvfp4 stores 4-bit floats in blocks of 16, each with a small fp8 scale.",
        "when": "Use nvfp4 to try that format on your model. For the best 4-bit quality start with wint4.",
        "use": "Write `--quant nvfp4`: `qrun chat DIR --quant nvfp4`.",
        "good": "nvfp4 is better than mxfp4, because its blocks are smaller and its scales finer.",
        "bits": "nvfp4 takes 4.5 bits a weight."}, "qrun chat DIR --quant nvfp4"),
    Term(("wint2", "2 bit weights", "2-bit weights", "int2", "two bits"), {
        "is": "wint2 stores the weights in 2 bits. It has to be prepared offline and costs a lot of quality.",
        "when": "Start with wint4. Two bits are only for models that fit in no other way.",
        "use": "wint2 is an offline format. For a small model today use `qrun chat DIR --wint4`.",
        "good": "wint2 loses a lot of quality when it is done without preparation. Use wint4 instead.",
        "bits": "wint2 takes a little more than 2 bits a weight."}, "qrun chat DIR --wint4"),
    Term(("mix", "mixquant", "mixed precision", "mix recipes", "mixed recipes", "mix:experts=w4,dense=w8",
    "per role precision"), {
        "is": "A mix recipe gives every role its own format, for example experts in 4 bits and dense layers in 8 bits.",
        "when": "Use a mix for MoE models: the experts hold most of the weights, so they can be small while the rest "
            "stays precise.",
        "use": "Write the roles: `--quant mix:experts=w4,dense=w8`.",
        "good": "A mix keeps most of the quality: only the big roles are made small.",
        "bits": "A mix takes as many bits as its roles: with 4-bit experts and 8-bit dense layers it is between 4.4 "
            "and 8."},
        "qrun chat ernie --quant mix:experts=w4,dense=w8"),
)  # fmt: skip

CACHES = (
    Term(("int8 kv", "--kv int8", "an int8 cache", "8-bit kv cache", "kv int8", "int8 kv cache", "8 bit cache"), {
        "is": "`--kv int8` keeps the keys and values of the context in 8 bits. It needs no rotation.",
        "when": "Use `--kv int8` for long contexts: it halves the cache and you will hardly notice.",
        "use": "Add `--kv int8`: `qrun chat DIR --kv int8`.",
        "good": "An int8 cache is nearly exact.",
        "bits": "An int8 cache takes 8.5 bits a value, about half of BF16."}, "qrun chat DIR --kv int8"),
    Term(("int4 kv", "--kv int4", "an int4 cache", "4-bit kv cache", "kv int4", "int4 kv cache", "4 bit cache"), {
        "is": "`--kv int4` keeps the keys and values in 4 bits. They are rotated by a Hadamard matrix first, so that "
            "outliers do less harm.",
        "when": "Use `--kv int4` for very long contexts or little memory.",
        "use": "Add `--kv int4`: `qrun chat DIR --kv int4`.",
        "good": "An int4 cache loses a little quality. The Hadamard rotation keeps the loss small.",
        "bits": "An int4 cache takes 4.5 bits a value, about 3.6 times smaller than BF16."}, "qrun chat DIR --kv int4"),
    Term(("fp8 kv", "--kv fp8", "an fp8 cache", "kv fp8", "fp8 kv cache"), {
        "is": "`--kv fp8` keeps the keys and values as 8-bit floats with their own scales.",
        "when": "Use `--kv fp8` if you prefer floats. `--kv int8` has the same size and is a little more exact.",
        "use": "Add `--kv fp8`: `qrun chat DIR --kv fp8`.",
        "good": "An fp8 cache is close to BF16, a little less exact than int8.",
        "bits": "An fp8 cache takes about half of BF16."}, "qrun chat DIR --kv fp8"),
    Term(("k8v4", "--kv k8v4", "kv k8v4", "a k8v4 cache"), {
        "is": "`--kv k8v4` keeps the keys in 8 bits and the values in 4 bits, because keys need more precision than "
            "values.",
        "when": "Use `--kv k8v4` as a middle way between int8 and int4.",
        "use": "Add `--kv k8v4`: `qrun chat DIR --kv k8v4`.",
        "good": "k8v4 loses less than an int4 cache: the keys are more sensitive, and they keep 8 bits.",
        "bits": "k8v4 takes 6.5 bits a value on average."}, "qrun chat DIR --kv k8v4"),
    Term(("kv cache", "the kv cache", "the key value cache", "kv", "a kv cache", "the context cache", "cache format"), {
        "is": "The KV cache keeps the keys and values of all tokens in the context. It grows with the context, so "
            "long chats need memory.",
        "when": "Make the KV cache smaller when the context is long: `--kv int8` first, then `--kv int4`.",
        "use": "Choose its format with `--kv`: int8, int4, fp8 or k8v4. For example `qrun chat DIR --kv int8`.",
        "good": "int8 is nearly exact, k8v4 is in the middle, and int4 loses a little.",
        "bits": "A value takes 16 bits in BF16, 8.5 in int8, 6.5 in k8v4 and 4.5 in int4."}, "qrun chat DIR --kv int8"),
)  # fmt: skip

WORDS = (
    Term(("quantization", "quantizing", "quantisation", "to quantize a model"), {
        "is": "Quantization stores the weights with fewer bits, so a model needs less memory and decodes faster. It "
            "costs some accuracy.",
        "when": "Quantize when the model does not fit, or when it should answer faster.",
        "use": "qrun quantizes while it loads: `qrun chat DIR --wint4`.",
        "good": "8 bits are nearly exact; 4 bits lose a little; 2 bits lose a lot.",
        "bits": "16 bits become 8 with wint8 and about 4.4 with wint4."}, "qrun chat DIR --wint4"),
    Term(("a recipe", "recipes", "the recipe", "recipe"), {
        "is": "A recipe says which format the weights, the activations and the cache use, such as W4A16C8.",
        "use": "Give a recipe with `--quant`: `qrun chat DIR --quant W4A16C8`.",
        "when": "Write a recipe when the short flags such as `--wint4` are not enough."},
        "qrun chat DIR --quant W4A16C8"),
    Term(("W4A16C8", "w4a16c8", "--quant W4A16C8", "W8A8C8", "the WxAyCz grammar", "W A C", "the letters W A and C"), {
        "is": "W is the weights, A the activations and C the cache. W4A16C8 is 4-bit weights, 16-bit activations and "
            "an 8-bit cache.",
        "use": "Write it after `--quant`: `qrun chat DIR --quant W4A16C8`.",
        "when": "Use it to set weights, activations and cache in one word. A missing part means 16 bits."},
        "qrun chat DIR --quant W4A16C8"),
    Term(("perplexity", "ppl"), {
        "is": "Perplexity says how surprised a model is by a text. Lower is better, and `qrun eval` measures it.",
        "use": "Run `qrun eval`. It prints the perplexity for each recipe."}, "qrun eval"),
    Term(("kl divergence", "kld", "KL"), {
        "is": "KL divergence says how far a quantized model's predictions are from BF16. Zero means the same.",
        "use": "Run `qrun eval`. It prints the KL divergence for each recipe."}, "qrun eval"),
    Term(("prefill", "prompt processing", "pp512"), {
        "is": "Prefill is reading the prompt: many tokens at once. It is limited by arithmetic.",
        "good": "Prefill speed is the pp row of `qrun bench`."}, "qrun bench"),
    Term(("decode", "decoding", "token generation", "tg128"), {
        "is": "Decode is writing the answer, one token at a time. It is limited by memory bandwidth, so smaller "
            "weights are faster.",
        "good": "Decode speed is the tg row of `qrun bench`."}, "qrun bench"),
    Term(("a token", "tokens", "token"), {"is": "A token is a piece of text, often a part of a word. Models read and "
        "write tokens."}),
    Term(("moe", "mixture of experts", "a mixture of experts", "MoE models", "experts", "the experts"), {
        "is": "In a mixture of experts, a router picks a few experts for each token. So a big model only uses a part "
            "of its weights each step.",
        "use": "MoE models load like any other: `qrun chat ernie --wint4`."}, "qrun chat ernie --wint4"),
    Term(("the router", "router", "a router"), {"is": "The router chooses the experts of a token. qrun keeps it in "
        "fp32, because it is small and sensitive."}),
    Term(("shared expert", "a shared expert", "shared experts"), {"is": "A shared expert is used by every token, "
        "beside the experts that the router picks."}),
    Term(("the run card", "run card", "a run card"), {
        "is": "The run card is printed at the start. It shows the model, the format of every role, the backend and "
            "the predicted memory.",
        "use": "It is printed when a model starts. `qrun info` tells more."}, "qrun info"),
    Term(("a zero point", "zero points", "zero-point"), {"is": "A zero point shifts a group of integers, so that a "
        "lopsided range is used well. wint4 has one per group."}),
    Term(("a scale", "scales", "the scale"), {"is": "A scale turns stored integers back into weights. wint8 has one "
        "per output channel, wint4 one per group of 64."}),
    Term(("hadamard rotation", "the hadamard rotation", "hadamard", "rotation"), {
        "is": "The Hadamard rotation spreads outliers over many values, so that 4 bits are enough for the KV cache."}),
    Term(("activations", "an activation"), {"is": "Activations are the values that flow between layers. With wint4 "
        "and wint8 they stay in 16 bits."}),
    Term(("a checkpoint", "checkpoints", "checkpoint directory"), {
        "is": "A checkpoint is a directory with config.json, tokenizer.json and safetensors files.",
        "use": "Give its directory: `qrun chat DIR`."}, "qrun chat DIR"),
    Term(("safetensors", "safetensors files"), {"is": "safetensors is the file format of the weights. qrun reads it, "
        "in one file or in several shards."}),
    Term(("a backend", "backends", "backend"), {
        "is": "A backend runs the model on a device. This release has the CPU backend; CUDA and Intel XPU are coming.",
        "use": "Choose it with `--device`. Today that is `--device cpu`."}, "qrun chat --device cpu"),
    Term(("temperature", "--temp", "the temperature"), {
        "is": "Temperature sets how freely the model chooses words. 0 always takes the most likely token.",
        "use": "Set it with `--temp`: `qrun chat --temp 0`."}, "qrun chat --temp 0"),
    Term(("top-p", "top p", "--top-p", "nucleus sampling"), {
        "is": "Top-p keeps the most likely tokens until their probabilities add up to p.",
        "use": "Set it with `--top-p`: `qrun chat --top-p 0.9`."},
        "qrun chat --top-p 0.9"),
    Term(("top-k", "top k", "--top-k"), {"is": "Top-k keeps only the k most likely tokens.",
    "use": "Set it with `--top-k`: `qrun chat --top-k 40`."},
        "qrun chat --top-k 40"),
    Term(("the seed", "a seed", "--seed", "seed"), {
        "is": "The seed fixes the random choices, so that the same prompt gives the same answer. It is random by "
            "default, but printed.",
        "use": "Set it with `--seed`: `qrun chat --seed 7`."}, "qrun chat --seed 7"),
    Term(("--strict", "strict mode", "strict"), {
        "is": "`--strict` refuses to fall back to a slower kernel. If one would be needed, qrun stops with exit code "
            "5.",
        "use": "Add `--strict`: `qrun chat DIR --wint4 --strict`."}, "qrun chat DIR --wint4 --strict"),
    Term(("--offline", "offline mode"), {
        "is": "`--offline` uses only files that are already on this machine. Nothing is downloaded.",
        "use": "Add `--offline`: `qrun chat ernie:0.3b --offline`."}, "qrun chat ernie:0.3b --offline"),
    Term(("--no-cache", "no cache"), {
        "is": "`--no-cache` neither reads nor writes the cache of quantized weights.",
        "use": "Add `--no-cache`: `qrun chat DIR --wint4 --no-cache`."},
        "qrun chat DIR --wint4 --no-cache"),
    Term(("ernie", "ernie 4.5", "ERNIE-4.5", "ernie-4.5", "baidu ernie"), {
        "is": "ERNIE-4.5 is a family of open models by Baidu, dense and MoE. qrun runs the text models from 0.3B to "
            "300B.",
        "use": "Run `qrun chat ernie --wint4`. qrun picks the largest one that fits.",
        "bits": "ERNIE-4.5 comes as 0.3B, 21B and 300B. Run `qrun chat ernie` and the largest that fits is picked."},
        "qrun chat ernie --wint4"),
    Term(("qrun", "this program", "this tool", "QRUN", "qrun exactly"), {
        "is": "qrun runs language models on your own machine. It quantizes a checkpoint while loading, so the model "
            "you have becomes one that fits.",
        "use": "Start with `qrun chat`. For your own model: `qrun chat DIR --wint4`.",
        "when": "Use qrun when you want to run a model on your own workstation, in little memory."}, "qrun chat"),
    Term(("fastdeploy", "paddle fastdeploy"), {"is": "FastDeploy is a serving toolkit whose precision names qrun "
        "speaks. qrun is made for one workstation."}),
)  # fmt: skip

TERMS = FORMATS + CACHES + WORDS
