"""What spark should know about using qrun, as data: questions in many phrasings, answers that are true of qrun.

A `Topic` may carry an `example` command, a reason (`why`) and one more fact (`more`) for the follow-up questions.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """Question templates, answer templates and what a follow-up can ask for."""

    asks: tuple[str, ...]
    answers: tuple[str, ...]
    example: str = ""
    why: str = ""
    more: str = ""


def topic(asks: str, answer: str, *, example: str = "", why: str = "", more: str = "") -> Topic:
    return Topic(tuple(a.strip() for a in asks.strip().splitlines()), (answer,), example, why, more)


TOPICS = (
    topic("""$how {start|begin|get started|start chatting|chat|talk to you|start a chat|have a conversation|get going}
          {getting started|first steps|quick start|quickstart|basic usage|usage}
          {where|how} do i {begin|start}
          what {should i|do i} {type|run|do} first
          how {does one|do people} use this
          what is the {first|simplest|basic|main|easiest} command
          $how use {qrun|this|it|this tool|this program}""",
       "Run `qrun chat`. That starts me, the small embedded model. For your own model give its directory: `qrun chat "
       "DIR --wint4`.",
       example="qrun chat", more="Type /help in the chat to see the slash commands."),
    topic("""$how $run {my own|my|another|a local|a downloaded|a different|some other} {model|checkpoint|llm}
          $how $run a model {from|in|out of} {a directory|a folder|my disk|disk|a local path|my hard drive}
          i have a {model|checkpoint} {in a folder|on disk|on my disk|in a directory|downloaded|here}
          {chat|talk} with my own {model|checkpoint|llm}
          $how {point qrun at|give qrun|pass} my {model|checkpoint}
          $how load {local weights|my weights|a checkpoint|my checkpoint}""",
       "Give its directory: `qrun chat DIR`. Add `--wint4` to load it with 4-bit weights.",
       example="qrun chat DIR --wint4", more="The directory needs config.json, tokenizer.json and safetensors files."),
    topic("""$how $run {ernie|ernie 4.5|ERNIE-4.5|the ernie model|ernie models|an ernie}
          $how {get|download|fetch} {ernie|ernie 4.5|ERNIE-4.5}
          $can $run {ernie|ernie 4.5}
          {chat with ernie|ernie chat|run ernie|use ernie|ernie please}""",
       "Run `qrun chat ernie --wint4`. A bare `ernie` picks the largest ERNIE-4.5 that fits, and says so.",
       example="qrun chat ernie --wint4", more="You can choose the size yourself: `qrun chat ernie:0.3b` or `qrun "
           "chat ernie:21b --wint4`."),
    topic("""$how $run {the small|a small|the smallest|a tiny|the little} {ernie|ernie model|real model|\
       model from the hub}
          what is the smallest {ernie|ernie model|real model|useful model}
          {my machine|my laptop|my computer} is {small|weak|old|slow}, which model {should i use|can i run}
          which {ernie|model} {needs|takes|uses} the least {memory|ram}""",
       "Run `qrun chat ernie:0.3b`. It is the smallest ERNIE-4.5 and needs less than 1 GB in BF16.",
       example="qrun chat ernie:0.3b"),
    topic("""which models {are supported|work|can i run|can i use|does qrun support|does qrun run|can qrun load|\
       do you support}
          what {models|model families|architectures|kinds of models} {are supported|can i run|does qrun support|work}
          {supported models|list of models|model list|model families|supported architectures}
          $does support {llama|mistral|qwen|qwen2|qwen3|other models|llama models|qwen models}
          $can $run {llama|mistral|qwen|qwen2|qwen3|a llama|a qwen model|a mistral}
          $what the supported models
          is {llama|mistral|qwen|qwen3|ernie} supported""",
       "qrun runs ERNIE-4.5 (dense and MoE), Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE. Anything else is refused by "
       "name.",
       example="qrun chat DIR", why="A wrong guess about a model gives wrong answers, so qrun refuses what it does "
           "not know."),
    topic("""$does support {gemma|phi|deepseek|mamba|gpt-2|falcon|bloom|t5|whisper|kimi|glm}
          $can $run {gemma|phi|deepseek|mamba|gpt-2|falcon|bloom|t5|whisper|kimi|glm}
          is {gemma|phi|deepseek|mamba|gpt-2|falcon|bloom|glm} supported
          {what about|how about} {gemma|phi|deepseek|mamba|falcon|glm}
          $how $run {gemma|phi|deepseek|mamba|gpt-2|falcon|glm}""",
       "No, not in this release. qrun runs ERNIE-4.5, Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE.",
       example="qrun chat DIR"),
    topic("""$does {understand|see|read|support} {images|pictures|photos|video|audio|vision models}
          $can {send|show|upload|use} {an image|a picture|a photo|pictures|images|a video}
          {are|is} {vision|multimodal|image} {models|input} supported""",
       "No. qrun runs text models only; vision models are refused by name."),
    topic("""$does {read|load|support|open|run} {gguf|gguf files|gptq|awq|gptq models|awq checkpoints|a gguf}
          $can {use|load|run|open} {gguf|a gguf file|gguf models|gptq|awq|pytorch bin files|a .bin file|pickle files}
          is {gguf|gptq|awq} supported
          $how load {gguf|a gguf|gptq|awq}""",
       "Not in this release. qrun reads safetensors checkpoints and quantizes them itself while loading.",
       example="qrun chat DIR --wint4", why="Pickle files can run code when they are opened, so qrun never opens "
           "them."),
    topic("""$how {generate|get|make|write} {text|one answer|a single answer|a completion|one reply} {without a chat|\
       from a script|from the shell|once|}
          $how {use|call|run} qrun {in a script|from a script|in a pipeline|non-interactively|from bash|in bash|\
             from another program}
          {scripting|scriptable mode|one-shot mode|one shot|batch use|non interactive use}
          $how {pass|give|send} {a prompt|one prompt|a single prompt} {on the command line|from the command line|}
          what does {generate|qrun generate|the generate command} do
          {generate|qrun generate|generate command}""",
       'Use `qrun generate -p "your prompt"`. It prints the answer to stdout and exits, so it fits in scripts.',
       example='qrun generate -p "Say hello"', more="A model can come first: `qrun generate DIR -p \"Say hello\"`."),
    topic("""$how {summarise|summarize|process|read|use} {a file|a text file|notes|my notes|a document|notes.txt|a text}
          $how {pipe|feed|send|give} {text|a file|a document|input|stdin|notes} {to qrun|to the model|into it|into qrun}
          $can {pipe|use pipes|read from stdin|use stdin|read a file}
          {stdin|pipes|pipe a file|piping|standard input}
          does {it|qrun} read {stdin|standard input|from a pipe}""",
       'Pipe it: `cat notes.txt | qrun generate -p "Summarise:"`. The text from stdin comes first, then the prompt.',
       example='cat notes.txt | qrun generate -p "Summarise:"'),
    topic("""$how {get|have|print|produce} {json|json output|the answer as json|output as json|machine readable output}
          {json|json output|json format|output json}
          $can {get|have} json
          $does {print|write|support|output} json""",
       'Add `--json`: `qrun generate --json -p "Say hello"`. It prints one JSON object with the text and the stats.',
       example='qrun generate --json -p "Say hello"'),
    topic("""$how {measure|test|check|see} {the speed|speed|tokens per second|performance|how fast it is|throughput}
          $how {benchmark|bench} {a model|my model|my machine|qrun|}
          {benchmark|bench|qrun bench|speed test|bench command}
          what does {bench|qrun bench|the bench command} do
          how {fast|quick} is {my model|my machine|a model|the model}
          how many tokens per second {do i get|will i get|can i get}""",
       "Run `qrun bench`. It prints a table: pp512 is the speed of reading a prompt, tg128 the speed of writing.",
       example="qrun bench DIR --wint4"),
    topic("""$how {measure|test|check|compare|evaluate} {the quality|quality|accuracy|how good a recipe is|\
       what quantization costs|the loss}
          $how {evaluate|eval} {a model|my model|a recipe|recipes|}
          {eval|qrun eval|evaluation|quality test|eval command}
          what does {eval|qrun eval|the eval command} do
          $how compare {formats|recipes|wint4 and bf16|number formats|quality}
          how do i know {what i lose|how much quality is lost|if the quality is ok}""",
       "Run `qrun eval`. It prints perplexity and KL divergence for each recipe, on my held-out text or on your file.",
       example="qrun eval DIR"),
    topic("""$how {see|list|show|find} {the cache|cached weights|cached models|what is cached|cache entries|\
       the cached files}
          $what {the cache|the weight cache|qrun cache}
          where {are|is} {the quantized weights|the cache|cached weights} {stored|kept|saved}
          {cache|qrun cache|cache ls|qrun cache ls|list the cache}
          does qrun {quantize again|requantize|quantize every time} {at every start|on each start|the next time|}
          {why is|is} the second start faster""",
       "Quantized weights are cached, so a second start does not quantize again. `qrun cache ls` lists them.",
       example="qrun cache ls", more="`qrun cache prune` deletes them and `--no-cache` goes without."),
    topic("""$how {clear|empty|delete|clean|prune|remove|wipe} {the cache|cached weights|cache files|cached models|\
       the weight cache|old cache files}
          $how {free|get back|save} {disk space|space on disk|my disk|some disk}
          {my disk is full|the cache is too big|the cache takes too much space|disk full|no space left on disk}
          {cache prune|qrun cache prune|prune|clear cache|delete cache}""",
       "Run `qrun cache prune`. It deletes the cached quantized weights; they are made again when needed.",
       example="qrun cache prune", more="Downloaded checkpoints stay in the Hugging Face cache."),
    topic("""$how {see|show|check|find out} {what is installed|my hardware|the backends|which kernels are used|\
       system info|which device is used}
          {info|qrun info|info command|system information}
          what does {info|qrun info|the info command} do
          which {kernel|backend|device} {is used|does it use|am i using|runs my model}""",
       "Run `qrun info`. It shows this machine, the backends and which kernel each operation uses.",
       example="qrun info"),
    topic("""$does {work|run} {on a gpu|on my gpu|on nvidia|with cuda|on a graphics card|on my rtx|on an nvidia card|\
       on cuda}
          $can use {a gpu|my gpu|cuda|my graphics card|nvidia|an nvidia card|the gpu}
          $how {use|enable|run on|select} {a gpu|my gpu|the gpu|cuda|nvidia}
          {gpu|cuda|gpu support|nvidia|cuda support|nvidia gpu|is there gpu support|when is cuda coming|--device cuda}
          {i have|my machine has|there is} {an nvidia card|a gpu|an rtx 4090|an h100|a graphics card|an rtx 3060}
          {is|are} {cuda|gpus|nvidia cards} supported""",
       "Not yet: this release runs on the CPU. CUDA and Intel XPU backends are coming.",
       example="qrun chat --device cpu",
       why="The first release gets the CPU right. The other backends plug into the same borders later."),
    topic("""$does {work|run} {on intel xpu|on an intel gpu|on intel arc|on xpu|with an arc card}
          $can use {xpu|an intel gpu|intel arc|my arc card|the intel graphics}
          {xpu|intel xpu|intel arc|xpu support|intel gpu support|--device xpu}
          $how {use|run on} {xpu|an intel gpu|intel arc}""",
       "Not yet: this release runs on the CPU. The Intel XPU backend is coming, and so is CUDA.",
       example="qrun chat --device cpu"),
    topic("""$does {work|run} on {amd|an amd gpu|rocm|apple silicon|metal|a mac gpu|a tpu|an npu|vulkan}
          $can use {an amd gpu|rocm|apple silicon|metal|a tpu|an npu|vulkan}
          is {amd|rocm|metal|vulkan} supported""",
       "No. This release runs on the CPU; the backends that are coming are CUDA and Intel XPU."),
    topic("""$does {work|run} {on the cpu|on a cpu|without a gpu|on cpu only|on my laptop|with no gpu|\
       on a normal computer}
          $can $run {it|qrun|models|a model} {on the cpu|without a gpu|on cpu|on my laptop|on my processor|\
             with no graphics card}
          {cpu|cpu only|no gpu|--device cpu|cpu support|device cpu|i have no gpu|i don't have a gpu|without gpu}
          $how $run {it|qrun|a model} {on the cpu|on cpu|without a gpu}
          do i need a {gpu|graphics card}
          is a gpu {needed|required|necessary}
          {what|which} {hardware|devices|backends} {does it run on|are supported|is supported|do i need|\
             does qrun support}""",
       "qrun runs on the CPU, and in this release that is the only backend. You can write it out with `--device cpu`.",
       example="qrun chat --device cpu", more="CUDA and Intel XPU backends are coming."),
    topic("""$how make {a model|my model|the model|it} {smaller|fit|fit in memory|use less memory|lighter|need less ram}
          {my model does not fit|the model is too big|it does not fit in memory|out of memory|not enough memory|\
             i run out of memory|oom|too big}
          $how {save|reduce} {memory|ram|the memory use|memory usage}
          {i have only|i only have|my machine has} {little|not much|8 gb of|16 gb of|4 gb of} {memory|ram}
          {what|which recipe} {saves|needs the least} memory
          it says {it does not fit|out of memory|exit code 4}""",
       "Use 4-bit weights, and a 4-bit cache for long contexts: `qrun chat DIR --wint4 --kv int4`.",
       example="qrun chat DIR --wint4 --kv int4", why="4-bit weights need about 3.6 times less memory than BF16, and "
           "so does a 4-bit cache.",
       more="A smaller context helps too: `-c 8k`."),
    topic("""$how make {it|the model|qrun|my model|answers} {faster|quicker|speed up|run faster|generate faster}
          {it is slow|the model is slow|this is too slow|why is it slow|so slow|it is too slow}
          {which|what} {format|recipe|precision} is {the fastest|fastest|fast}
          $how {speed up|increase the speed|get more tokens per second}""",
       "Use 4-bit weights: `qrun chat DIR --wint4`. Writing is limited by memory bandwidth, so smaller weights are "
       "faster.",
       example="qrun chat DIR --wint4", why="Each new token reads all active weights once. Fewer bytes take less "
           "time."),
    topic("""{which|what} {format|recipe|precision|quantization} {should i|do i|shall i} {use|choose|pick|take|\
       start with}
          {which|what} {format|recipe|precision} do you recommend
          {which|what} is the best {format|recipe|precision|quantization}
          {recommend|suggest|recommend me|suggest me} a {format|recipe|precision}
          what should i start with
          {help me choose|i can't decide|i can not decide on} a {format|recipe|precision}""",
       "Start with `--wint4`: it is the smallest with a small loss. Take `--wint8` if you have the memory and want "
       "nearly exact answers.",
       example="qrun chat DIR --wint4", more="`qrun eval` measures the difference on your model."),
    topic("""{wint4 or wint8|wint8 or wint4|4 bit or 8 bit|int4 or int8|8 or 4 bits|should i use wint4 or wint8|\
       4 bits or 8 bits}
          what is {better|best}, {wint4 or wint8|4 bit or 8 bit|int4 or int8|wint8 or wint4}
          {compare|difference between|what is the difference between|the difference of} {wint4 and wint8|\
             4 bit and 8 bit|int4 and int8|wint8 and wint4}
          is {wint8|8 bit|int8} better than {wint4|4 bit|int4}
          {wint4 vs wint8|wint8 vs wint4|int4 vs int8|4 bit versus 8 bit}""",
       "wint8 is nearly exact at 8 bits a weight. wint4 is about half that size and loses a little quality.",
       example="qrun chat DIR --wint4", why="4 bits have only 16 levels for each group, while 8 bits have 256."),
    topic("""{wint8 or fp8|fp8 or wint8|int8 or fp8|fp8 or int8|fp8 vs int8|wint8 vs fp8}
          what is {better|best}, {fp8 or int8|wint8 or fp8|fp8 or wint8}
          {compare|difference between|what is the difference between} {wint8 and fp8|fp8 and int8|fp8 and wint8}
          is fp8 better than {int8|wint8}""",
       "Both take 8 bits a weight. wint8 keeps the activations in 16 bits; fp8 also makes the activations fp8.",
       example="qrun chat DIR --wint8"),
    topic("""{wint4 or nf4|nf4 or wint4|wint4 or mxfp4|nf4 vs wint4|mxfp4 vs wint4|nvfp4 or wint4|mxfp4 or nvfp4}
          {which|what} {4-bit format|4 bit format|int4 format} {is best|is the best|should i use|do you recommend}
          {compare|what is the difference between|difference between} {the 4-bit formats|wint4 and nf4|nf4 and wint4|\
             mxfp4 and wint4|wint4 and nvfp4}""",
       "Among the 4-bit formats start with wint4: its scales and zero points come from an error-minimising search. "
       "nf4, mxfp4 and nvfp4 are codebooks.",
       example="qrun chat DIR --wint4"),
    topic("""{which|what} kv {format|cache} {should i use|is best|do you recommend|is the best}
          {int8 or int4 kv|int4 or int8 cache|kv int4 or kv int8|which kv cache should i take}
          what is the {difference|trade-off|tradeoff} between {int8 and int4 kv|the kv formats|kv int8 and kv int4|\
             int4 and int8 cache}
          {compare|list} the kv formats
          which kv formats {are there|exist|does qrun have|can i use}""",
       "Start with `--kv int8`: half the size and nearly exact. `--kv int4` is smaller and loses a little; k8v4 is "
       "between them.",
       example="qrun chat DIR --kv int8"),
    topic("""{which|what} formats {are there|exist|does qrun have|does qrun support|can i use|do you know}
          {list|show me|name} {the formats|all formats|the number formats|the precisions|all recipes}
          {number formats|formats|supported formats|list of formats|precisions}
          what {number formats|precisions|quantizations} {are supported|can i use|exist|do you have}""",
       "Weights: bf16, wint8, wint4, fp8, w8a8, nf4, mxfp4, nvfp4 and mixes of them. Cache: bf16, int8, int4, fp8 "
       "and k8v4.",
       example="qrun chat DIR --quant nf4"),
    topic("""$how quantize {a model|my model|the model|models|weights|ernie|llama|it|a checkpoint|something}
          $how {convert|compress|shrink|turn} {a model|my model|weights|a checkpoint} {to 4 bits|to int4|to 8 bits|}
          {quantize|quantize a model|quantize my model|quantise a model|make a quantized model}
          where is the quantize command
          do i {have to|need to} {quantize|convert} {first|the model first|before}""",
       "There is nothing to prepare: qrun quantizes while it loads. `qrun chat DIR --wint4` loads a model in 4 bits.",
       example="qrun chat DIR --wint4", more="The result is cached, so the second start is fast."),
    topic("""{why qrun|why should i use qrun|what is special about qrun|what makes qrun different|why not another tool|\
       what is qrun good for}
          {what are the advantages|the benefits|the features} of qrun
          {what can qrun do|what does qrun do|features|qrun features|what is this for|what is this}
          tell me {more |}about qrun""",
       "qrun turns the model you have into the model that fits, and talks to it: one command, any precision, on your "
       "own machine.",
       example="qrun chat DIR --wint4"),
    topic("""$how {set|change|increase|choose|make} {the context|the context size|the context length|a longer context|\
       a bigger context|the window}
          $how {use|get|have} {a long context|a longer context|a 32k context|more context|a bigger window}
          {context|context size|context length|long context|-c|ctx size|max context}
          how {long|big|large} can {the context|a conversation|the chat|my prompt} be
          what is the {flag|option} for the context""",
       "Set it with `-c`: `qrun chat DIR -c 32k`. `-c max` takes all that the model allows.",
       example="qrun chat DIR -c 32k", more="A smaller cache helps with long contexts: `--kv int8`."),
    topic("""what happens {when|if} the {context|window|conversation} {is full|overflows|runs out|gets too long|\
       is too long}
          {context overflow|overflow|context is full|the context is full}
          {the chat|my conversation} is too long
          $how {handle|deal with} {a full context|context overflow}""",
       "Then `--overflow` decides: `stop` ends the answer, and `roll` drops the oldest part of the conversation.",
       example="qrun chat DIR --overflow roll"),
    topic("""$how {get|have|make} {the same answer every time|reproducible answers|repeatable answers|\
       deterministic answers|the same output|deterministic output}
          {reproducible|deterministic|determinism|reproducibility|same answer twice}
          why {is the answer|are the answers} different {each time|every time}
          $how {make it|be} deterministic""",
       "Use `--temp 0` for the most likely answer, or fix the seed with `--seed 7`.", example="qrun chat --temp 0"),
    topic("""$how make {it|the model|answers|you} {more creative|less boring|more random|more varied|wilder}
          {the answers are boring|more creativity|creative answers}
          $how {change|set|raise|lower|adjust} {the sampling|sampling|sampling settings|creativity|randomness}
          which sampling {options|flags|settings} {are there|exist|does qrun have}""",
       "Raise the temperature: `qrun chat --temp 1`. There are `--top-k`, `--top-p` and `--min-p` too.",
       example="qrun chat --temp 1"),
    topic("""$how {limit|set|change|shorten} {the length|the answer length|the number of tokens|max tokens|\
       the output length}
          $how get {shorter|longer} {answers|output|replies}
          {max tokens|-n|--max-tokens|answer length|limit tokens}
          the answer is {cut off|too long|truncated|too short}""",
       'Set the most tokens of an answer with `-n`: `qrun generate -n 100 -p "Say hello"`.',
       example='qrun generate -n 100 -p "Say hello"'),
    topic("""$how {set|give|use|change|write} {a system prompt|the system prompt|a system message|instructions|a role}
          {system prompt|system message|-s|/system|role prompt}
          $can {set|change|use} {a system prompt|the system message}""",
       'Use `-s`: `qrun chat -s "You are brief."`. In the chat, `/system` sets it.',
       example='qrun chat -s "You are brief."'),
    topic("""$how {read|use|take} the prompt from a file
          {prompt from a file|-f|--file|prompt file}
          my prompt is in a file""",
       "Use `-f`: `qrun generate -f prompt.txt`.", example="qrun generate -f prompt.txt"),
    topic("""$how {work|run} {offline|without internet|without the internet|without a network|without network}
          {no internet|i have no internet|offline|i am offline|the hub can't be reached|no network}
          does {it|qrun} need {the internet|internet|a network|to be online}
          $can {work|run} offline""",
       "Add `--offline` to use only local files. I am part of the package, so `qrun chat` needs no network at all.",
       example="qrun chat --offline"),
    topic("""{is my data safe|do you send my data anywhere|is it private|privacy|are my chats private|\
       does qrun send data|who can read this}
          {does anything leave|does my text leave} {my machine|my computer|this computer}
          is this {conversation|chat} {private|sent to a server|stored online|uploaded}""",
       "Everything runs on your machine. qrun only goes to the network to download a model you ask for."),
)  # fmt: skip
