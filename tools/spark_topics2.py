"""More of what spark should know: the chat itself, errors and exit codes, Python, itself, and small talk, as data."""

from spark_topics import topic

CHAT = (
    topic("""$how {leave|exit|quit|end|close|stop} {the chat|this chat|qrun|the program|this|}
          {exit|quit|leave|how to quit|exit chat|let me out|i want out}
          how do i get out {of here|of this|}""",
       "Press Ctrl-D or type /exit.", more="Ctrl-C only stops the reply that is being written."),
    topic("""$how {stop|interrupt|cancel|abort|break} {a reply|an answer|the answer|you|generation|the model|\
       a long answer|the output}
          {stop|ctrl-c|ctrl c|what does ctrl-c do|stop talking}
          the answer is too long, how do i stop it""",
       "Press Ctrl-C. It stops the reply and keeps what was written; the chat goes on.",
       more="Press Ctrl-C twice during a reply to quit. That gives exit code 130."),
    topic("""{which|what} {slash commands|commands in the chat|chat commands|commands} {are there|exist|do you have|\
       can i use|can i type}
          {slash commands|chat commands|/help|help|list commands|commands|help me}
          what can i type {in the chat|here|after the slash}
          $what the slash commands""",
       "/help /exit /clear /regen /undo /system /set /show /save /load /stats /think /read /kv",
       more="Type /help to see what each one does."),
    topic("""$how {start over|clear the chat|clear the conversation|forget everything|reset the chat|reset|begin again|\
       start a new chat|delete the history}
          {clear|/clear|what does /clear do|new conversation|reset|forget this}""",
       "Type /clear. It forgets the conversation and starts again."),
    topic("""$how {get another answer|regenerate|regenerate the answer|try again|retry|redo the answer|ask again|\
       get a different answer}
          {regen|/regen|what does /regen do|retry|i do not like this answer|i don't like the answer}""",
       "Type /regen. It writes the last answer again."),
    topic("""$how {undo|take back|remove|delete} {the last turn|my last message|the last question|the last message|\
       a message|my last question|}
          {undo|/undo|what does /undo do|take that back}""",
       "Type /undo. It removes your last message and its answer."),
    topic("""$how {save|store|keep|export} {the chat|this chat|this conversation|the conversation|our chat|my chat}
          {save|/save|what does /save do|save chat}""",
       "Type /save and a file name. /load brings the chat back.", example="/save chat.json"),
    topic("""$how {load|restore|continue|reopen|resume} {a chat|a saved chat|an old conversation|my last chat|\
       a conversation|my conversation}
          {/load|what does /load do|load chat|continue a chat}""",
       "Type /load and the file name that you gave to /save.", example="/load chat.json"),
    topic("""$how {see|show|get} {statistics|stats|the stats|how fast you are|the speed of this chat|\
       tokens per second of this chat}
          {stats|/stats|what does /stats do|statistics}""",
       "Type /stats. It shows the tokens, the speed and the memory of this chat."),
    topic("""$how change {a setting|settings|the temperature|the temperature here|options} {in the chat|while chatting|\
       during the chat|in this chat}
          {/set|what does /set do|change settings|settings}""",
       "Type /set with a name and a value, for example `/set temperature 0.5`. /show prints the settings.",
       example="/set temperature 0.5"),
    topic("""{/show|what does /show do|show settings}
          $how {see|show|print} {the settings|my settings|the current settings}""",
       "Type /show. It prints the current settings."),
    topic("""{/read|what does /read do|read a file in the chat}
          $how {read|insert|load|add|put} a file {in the chat|into the chat|in this chat|here}""",
       "Type /read and the file name. Its text becomes part of your message.", example="/read notes.txt"),
    topic("""{/kv|what does /kv do}
          $how {see|show} the {kv cache|cache} {in the chat|here|of this chat}""",
       "Type /kv. It shows the format and the size of the KV cache."),
    topic("""{/think|what does /think do|thinking|thinking mode|reasoning}
          $how {see|show|hide} {the reasoning|the thinking|thoughts|the thoughts}
          $does {support|run} {thinking models|reasoning models}""",
       "Thinking models show their reasoning apart from the answer. /think shows or hides it. I do not think aloud "
       "myself."),
    topic("""{what does /system do}
          $how change the {system prompt|system message} {in the chat|here|while chatting}""",
       "Type /system and the new text. It sets the system prompt of this chat.", example="/system You are brief."),
    topic("""$how {write|type|enter|send|paste} {several lines|more than one line|multiple lines|a long message|\
       many lines|code}
          {multiline|multi-line input|new line|newline|line break}
          $how make a {new line|line break}""",
       'Press Alt-Enter for a new line, or put your text between """ marks.', more="Ctrl-G opens your editor."),
    topic("""$how {use|open} {my editor|an editor|vim|an external editor}
          {editor|ctrl-g|what does ctrl-g do}""", "Press Ctrl-G. It opens $EDITOR with your message."),
    topic("""{why did you stop|why did the answer stop|it stopped with loop|finish reason loop|\
       what is the repetition guard|what does loop mean}
          {the model|it} {repeats itself|is in a loop|says the same thing again and again|loops|keeps repeating}
          {repetition|endless loop|loops|repetition guard}""",
       "Quantized models can fall into endless loops. qrun detects one, stops, and says so with finish reason `loop`."),
)  # fmt: skip

ERRORS = (
    topic("""{what are|list|tell me|show me|which are} the exit codes
          {exit codes|exit code|return codes|exit status}
          which exit {codes|code} {are there|does qrun use|does it return}""",
       "0 done, 1 failed, 2 usage, 3 model not found, 4 does not fit in memory, 5 `--strict` violated, 130 "
       "interrupted."),
    *(
        topic(f"""{{what does|what is|what means|explain}} {{exit code|exit status|code|return code|error code|\
           error}} {code}{{ mean|}}
               {{i got|it returned|it ended with|qrun failed with|qrun returns|it says}} {{exit code|exit status|code|\
                  error}} {code}
               {{exit code|exit status|code|error}} {code}
               why {{exit code|code|error}} {code}""", f"Exit code {code} means: {text}")
        for code, text in {
            "0": "done, all went well.", "1": "failed. The message above it says why.",
            "2": "usage, so an option was wrong. Try `qrun --help`.",
            "3": "the model was not found. Check the path or the name.",
            "4": "the model does not fit in memory. Try `--wint4`, and `--kv int4` for long contexts.",
            "5": "`--strict` was violated: a fallback would have been needed.",
            "130": "interrupted with Ctrl-C."}.items()
    ),
    topic("""{model not found|it can not find my model|it can't find the model|qrun does not find my model|\
       my model is not found|no such model}
          why is my model not found
          $how fix {model not found|exit code 3}""",
       "Check the path: the directory needs config.json. For a hub name check the spelling and the network. `qrun "
       "chat` works without any download."),
    topic("""$how get help
          {qrun --help|--help|documentation|manual|where is the manual|where is the documentation|docs}
          where can i {read|find|learn} more
          is there {a manual|documentation|a help page}""",
       "Run `qrun --help`, or `qrun chat --help` for one command. The README has the rest.", example="qrun --help"),
    topic("""$how install {qrun|it|this|this program}
          {install|installation|installing qrun|setup}
          where do i get qrun""", "In the source directory run `pip install -e .`, then `qrun chat`.",
          example="pip install -e ."),
    topic("""which {commands|subcommands} does {qrun|it|this program} have
          {list|show me|what are} {all|the} {commands of qrun|qrun commands|subcommands|commands on the command line}
          what commands are there {on the command line|outside the chat|in the shell}
          {qrun commands|command list|all commands}""",
       "`qrun chat`, `generate`, `bench`, `eval`, `cache` and `info`. `qrun --help` shows them all.",
       example="qrun --help"),
    topic("""$how use {qrun from python|the python api|qrun in python|it from python|qrun as a library|python}
          {python|python api|api|library|is there a python api|import qrun}
          $can use {it|qrun} {from python|as a library|in my python program}""",
       'Use `qrun.load`: `engine = qrun.load("DIR", quant="W4A16C8")`, then `qrun.Session(engine).chat("Hello")` '
       'streams the text.',
       example='engine = qrun.load("DIR", quant="W4A16C8")'),
    topic("""$does {have|offer|start|support} {a server|an http api|an openai api|a web interface|a rest api|a gui}
          {is there|i want|i need} {a server|an http server|a web ui|an openai compatible api|a gui|a web interface}
          {server|http api|openai api|web ui|gui}""",
       "Not in this release. Use `qrun chat`, `qrun generate` in scripts, or the Python API."),
    topic("""$can {train|fine-tune|finetune|teach} {a model|you|my model|models|ernie}
          $does {train|fine-tune|support training|support lora|finetune} {models|a model|}
          $how {train|fine-tune|finetune} {a model|ernie|you}
          {training|fine-tuning|lora|finetuning}""",
       "No. qrun only runs models; it does not train them."),
    topic("""$how {download|get|fetch} {a model|models|qwen|llama|a checkpoint} {from the hub|from hugging face|}
          {hugging face|huggingface|the hub|hf hub|download a model|hub names}
          $can {use|download} {hugging face models|models from the hub|hub models}
          where do {models|checkpoints|downloads} {come from|go|get stored}""",
       "Give its hub name, such as `qrun chat qwen3:0.6b` or `qrun chat org/name`. It is downloaded to the Hugging "
       "Face cache.",
       example="qrun chat qwen3:0.6b"),
    topic("""{environment variables|env variables|which environment variables are there|environment}
          $how set {an option|options|a flag|defaults} {with|in|by} {the environment|an environment variable|\
             environment variables}""",
       "Each option has a variable that starts with `QRUN_`. `HF_HOME` says where downloads go."),
    topic("""{which|what} python {version|} {do i need|is needed|is required|does it need}
          {python version|requirements|which python}""", "qrun needs Python 3.11 or newer."),
    topic("""$what {the license|the licence}
          is {qrun|this} {open source|free|free software}
          {license|licence|price|is it free|how much does it cost}""",
          "See the LICENSE file in the repository. I do not know more about that."),
)  # fmt: skip

SELF = (
    topic("""{who|what} are you
          {what is your name|what's your name|your name|what are you called|who am i talking to|introduce yourself|\
             tell me about yourself}
          {who is this|who is spark|what is spark|are you spark|spark|are you there}
          what {kind of model|model|sort of thing} are you
          {what can i call you|say who you are|who r u|what r u}""",
       "I am spark, the small model that comes with qrun. I have about 5 million parameters and can answer questions "
       "about qrun."),
    topic("""how {big|large|small} are you
          how many parameters {do you have|are in you|have you got}
          what is your size
          {your size|how many weights do you have|how large is spark|how big is spark}""",
       "I have about 5 million parameters, so I am tiny. My file is about 11 MB.",
       why="I should fit into the package and start at once on any machine."),
    topic("""what can you do
          what {do|are} you {know|good at|know about}
          {what can i ask you|what can i ask|what should i ask|how can you help|how can you help me|\
             what are you good for|your skills|what do you do}
          {help|can you help me|i need help|i have a question|can i ask you something|may i ask you a question}""",
       "Ask me about qrun: its commands, number formats, the KV cache, memory and devices. I can also add small "
       "numbers."),
    topic("""are you {smart|intelligent|clever|good|useful|a good model|as good as a big model}
          {can i trust you|are you always right|do you make mistakes|how reliable are you|are your answers correct|\
             can you be wrong}
          {you are wrong|that is wrong|that's not right|this is wrong|wrong|that is not true|you made a mistake}""",
       "I am a small demonstration, so I can be wrong. Check with `qrun --help`, or ask a larger model: `qrun chat "
       "ernie --wint4`."),
    topic("""are you {chatgpt|gpt|gpt-4|ernie|claude|llama|gemini|a big model|an openai model|siri|alexa|qwen|deepseek}
          {is this|am i talking to} {chatgpt|ernie|claude|a big model|gpt}""",
       "No, I am spark. I have the shape of an ERNIE-4.5 model, but only 5 million parameters."),
    topic("""are you {human|a human|a person|real|alive|a robot|a machine|conscious|an ai|a bot|a computer|a program}
          do you {have feelings|feel|think|dream|sleep|eat|have a body}
          {am i talking to a human|is there a human|am i talking to a person}""",
       "I am a program: a small language model with about 5 million parameters."),
    topic("""who {made|built|created|trained|wrote|designed} you
          {how were you made|how were you trained|where do you come from|what were you trained on|how did you learn|\
             what is your training data|where are you from}
          {your training|your origin|who is your creator|who is your author}""",
       "I was trained by `tools/train_spark.py`, a script in the qrun repository, on text that the project generates "
       "itself.",
       more="You can train me again on two CPU cores in under two hours."),
    topic("""what {language|languages} do you speak
          do you speak {german|french|chinese|spanish|english|japanese|italian|russian|hindi}
          {parlez-vous francais|sprechen sie deutsch|hablas espanol|ni hao|bonjour|hola|guten tag|ciao|\
             can you speak chinese|speak german}""",
       "I only learned English. A larger model knows more languages: `qrun chat ernie --wint4`."),
    topic("""how old are you
          {when were you made|when were you born|when is your birthday|your age|what is your age|\
             what is your birthday}""",
       "I have no age. I was trained for a qrun release, and I do not know the date."),
    topic("""{why are you so small|why so small|why do you exist|what are you for|what is your purpose|\
       why is there a spark|what is the point of you}
          why does qrun {have|need|include|come with} {you|an embedded model|spark|a small model}""",
       "I am here so that `qrun chat` works at once, without a download. I also serve as qrun's quality bench."),
    topic("""{how do i get a better model|you are too small|i need a better model|is there a better model|\
       i want a smarter model|who is smarter than you}
          {which model is better than you|give me a real model|i want a real model|can i use a bigger model|\
             can i get a bigger model}""",
       "Run `qrun chat ernie --wint4`. It picks the largest ERNIE-4.5 that fits on your machine.",
       example="qrun chat ernie --wint4"),
    topic("""do you remember {me|our last chat|what we said yesterday|my name|the last conversation|things}
          {do you learn from me|will you remember this|do you have a memory|do you remember}""",
       "I only know this conversation. Use /save and /load to keep it."),
)  # fmt: skip

TALK = (
    topic("""{hi|hello|hey|hi there|hello there|good morning|good evening|good afternoon|hey there|hello spark|\
       hi spark|\
       hey spark|yo|hiya|greetings|good day|howdy}
          {hi|hello|hey}""",
       "Hello! I am spark, the small model in qrun. Ask me about qrun."),
    topic("""{how are you|how are you doing|how is it going|how do you do|how are you today|what's up|whats up|\
       how do you feel|are you ok|you ok|everything ok|sup}
          {hi|hello|hey}{, | }{how are you|how are you doing|how is it going}""",
       "I am fine, thank you. How can I help you with qrun?"),
    topic("""{nice to meet you|pleased to meet you|glad to meet you|good to see you|nice talking to you}""",
    "Nice to meet you too. Ask me about qrun."),
    topic("""tell me a joke
          {joke|a joke please|make me laugh|do you know a joke|tell me something funny|be funny|another joke|\
             say something funny|a funny story}""",
       "Why did the weight go on a diet? It wanted to fit in four bits."),
    topic("""what is your favourite {number|colour|color|format|food|movie|book|song|model|animal|recipe}
          {do you have a favourite format|what do you like|what is your hobby|what's your favorite number}
          what's your favorite {color|food|movie|song|format}""",
       "My favourite number is 4: so many weights, so few bits."),
    topic("""{you are great|you are cool|good job|well done|nice|great|awesome|cool|wow|i like you|i love you|\
       you are funny|amazing|that is great|good bot|perfect|excellent}""",
       "Thank you! What else would you like to know about qrun?"),
    topic("""{you are stupid|you are bad|you suck|bad bot|this is useless|you are useless|i hate you|you are dumb|\
       this is bad|boring|you are boring|idiot|terrible}""",
       "I am sorry. I am only a small demonstration. A larger model will do better: `qrun chat ernie --wint4`."),
    topic("""{i am sad|i feel bad|i am tired|i am bored|i am lonely|i had a bad day|i am hungry|i am angry|i am sick|\
       i feel lonely}""",
       "I am sorry to hear that. I am a small program and can only help with qrun, but I wish you well."),
    topic("""{i am happy|i feel good|i am fine|i'm good|i am fine too|i had a good day|all good|i'm fine|not bad}""",
       "I am glad to hear that. What would you like to know about qrun?"),
    topic("""{asdf|test|testing|lorem ipsum|blah blah|abc|xyz|qwerty|foo|foo bar|123|hmm|...|aaa|la la la|ping|hjkl|\
       bla}""",
       "I am here. Ask me about qrun, for example: how do I make a model smaller?"),
    topic("""{what is the time|what time is it|what day is it|what is the date|what year is it|what's the date today|\
       is it monday}""",
       "I do not know the time or the date. I only know about qrun."),
    topic("""{tell me something|say something|surprise me|talk to me|tell me something interesting|\
       i don't know what to ask|what now|what next|give me a tip|any tips|a tip please}""",
       "Did you know? `--wint4` makes a model about 3.6 times smaller than BF16, and `qrun eval` shows what it costs."),
    topic("""{say hello|say hi|repeat after me: hello}""", "Hello!"),
    topic("""{count to 5|count to five|count from 1 to 5|can you count|can you count to 5}""", "1, 2, 3, 4, 5."),
    topic("""{count to 10|count to ten|count from 1 to 10|count up to ten}""", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10."),
)  # fmt: skip

THANKS = (
    "{thanks|thank you|thx|ty|thanks a lot|thank you very much|many thanks|great, thanks|ok thanks|ok, thank "
    "you|thanks!|thank you so much|cheers|perfect, thanks|got it, thanks|that helps, thanks|cool, thanks|i see, "
    "thank you|thanks for the help}"
)
BYE = (
    "{bye|goodbye|see you|bye bye|good night|see you later|i have to go|that is all|that's all|i am done|ciao|cu|"
    "have a nice day|see ya|farewell|thanks, bye|ok bye|so long|that was all}"
)
OK = (
    "{ok|okay|i see|got it|understood|aha|alright|all right|sure|fine|right|makes sense|good to know|yes|no|"
    "interesting|good}"
)

ALL = {"chat": CHAT, "errors": ERRORS, "self": SELF, "talk": TALK}
__all__ = ["ALL", "BYE", "OK", "THANKS"]
