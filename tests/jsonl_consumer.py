import json
import subprocess

command = ["qrun", "generate", "ernie:0.3b", "--wint4", "--jsonl", "--quiet"]
model = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
for number, prompt in enumerate(["Name a tree.", "Name a river."]):
    print(json.dumps({"id": number, "prompt": prompt, "max_tokens": 40}), file=model.stdin, flush=True)
    for line in model.stdout:
        event = json.loads(line)
        if event["event"] == "delta":
            print(event["text"], end="", flush=True)
        elif event["event"] in ("done", "error"):
            print("", event.get("finish_reason") or event["message"])
            break
model.stdin.close()
