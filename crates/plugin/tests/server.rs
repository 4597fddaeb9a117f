//! llama.cpp's own llama-server with the plugin, over HTTP: `make test-server` builds it and runs these.

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{model, plugin, target};
use serde_json::{Value, json};

/// Half of the cells go after the eighth token of each answer.
const VOTES: &[(&str, &str)] = &[("GVOTE_VOTE", "8"), ("GVOTE_RATIO", "0.5")];
/// Tokens of an answer that has been voted on by then, and of one that has not.
const VOTED: u32 = 20;
const UNVOTED: u32 = 8;

fn program() -> PathBuf {
    let path = target().join("server/bin/llama-server");
    assert!(path.exists(), "{} is missing: run `make server`", path.display());
    path
}

struct Server {
    child: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl Server {
    /// Starts it, and waits until it answers. `variables`: with the plugin, and these; `None`: without.
    fn start(flags: &[&str], variables: Option<&[(&str, &str)]>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // free a moment ago
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let log = File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new(program());
        command.arg("-m").arg(model()).args([
            "-t",
            "1",
            "--no-warmup",
            "--port",
            &port.to_string(),
            "--slot-save-path",
        ]);
        command.arg(dir.path()).args(flags).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        if let Some(variables) = variables {
            command.env("LD_PRELOAD", plugin()).envs(variables.iter().copied());
        }
        let mut server = Self { child: command.spawn().unwrap(), port, dir };
        let deadline = Instant::now() + Duration::from_secs(120);
        while !agent().get(server.url("/health")).call().is_ok_and(|answer| answer.status() == 200) {
            assert_eq!(server.child.try_wait().unwrap(), None, "it ended: {}", server.log());
            assert!(Instant::now() < deadline, "it does not answer: {}", server.log());
            thread::sleep(Duration::from_millis(50));
        }
        server
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// gvote's lines of the log.
    fn gvote(&self) -> Vec<String> {
        self.log().lines().filter(|line| line.starts_with("gvote: ")).map(str::to_owned).collect()
    }

    fn votes(&self) -> usize {
        self.gvote().iter().filter(|line| line.contains(" -> ")).count()
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let mut answer = agent().post(self.url(path)).send_json(body).unwrap();
        (answer.status().as_u16(), answer.body_mut().read_json().unwrap())
    }

    /// The answer to a chat, and how many tokens of it were in the cache.
    #[track_caller]
    fn chat(&self, messages: &[(&str, &str)], max_tokens: u32) -> (String, u64) {
        let (status, answer) = self.post("/v1/chat/completions", &chat(messages, max_tokens));
        assert_eq!(status, 200, "{answer}");
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
        let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        (text.to_owned(), cached)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).build().into()
}

fn chat(messages: &[(&str, &str)], max_tokens: u32) -> Value {
    let messages: Vec<Value> =
        messages.iter().map(|(role, content)| json!({ "role": role, "content": content })).collect();
    json!({ "messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true })
}

/// A document of some 500 tokens: the same for the same number, and from its first word another for another one.
fn document(n: usize) -> String {
    let line =
        |i: usize| format!("Shelf {} of room {n} holds {} boxes with the label {}.\n", i, (i * 37 + n) % 91, i * n + 7);
    (0..26).map(line).collect()
}

/// Requests of one client after another. What is not voted on itself is the same with the plugin and without: the answers, and the
/// tokens that were in the cache already.
fn requests(server: &Server) -> Vec<(String, u64)> {
    let (first, second) = (document(3), document(5));
    let question = format!("{first}\nWhat is on shelf 4?");
    let mut told = Vec::new();
    // an answer with a vote in it, the next turn, the same once more, another question after the same document
    server.chat(&[("user", &question)], VOTED);
    let turn = [("user", question.as_str()), ("assistant", "Boxes."), ("user", "And on shelf 5?")];
    told.push(server.chat(&turn, UNVOTED));
    told.push(server.chat(&turn, UNVOTED));
    server.chat(&turn, VOTED);
    told.push(server.chat(&[("user", &format!("{first}\nHow many shelves are there?"))], UNVOTED));
    // another document takes the slot, and the first one comes back out of the server's own memory
    server.chat(&[("user", &question)], VOTED);
    told.push(server.chat(&[("user", &format!("{second}\nWhat is on shelf 4?"))], UNVOTED));
    told.push(server.chat(&turn, UNVOTED));
    // saved in the middle of a vote, and back from a file
    server.chat(&turn, VOTED);
    let (status, saved) = server.post("/slots/0?action=save", &json!({ "filename": "slot" }));
    assert_eq!(status, 200, "{saved}");
    let (status, erased) = server.post("/slots/0?action=erase", &json!({}));
    assert_eq!(status, 200, "{erased}");
    let (status, restored) = server.post("/slots/0?action=restore", &json!({ "filename": "slot" }));
    assert_eq!((status, &restored["n_restored"]), (200, &saved["n_saved"]), "{restored}");
    told.push(server.chat(&turn, UNVOTED));
    server.chat(&turn, VOTED);
    told
}

#[test]
#[ignore = "needs llama-server: make test-server"]
fn answers_without_a_vote_are_those_of_the_server_alone() {
    let flags = ["-c", "2048", "-np", "1"];
    let plain = requests(&Server::start(&flags, None));
    assert!(plain[0].1 > 400, "the prefix is reused: {plain:?}");

    let server = Server::start(&flags, Some(VOTES));
    assert_eq!(requests(&server), plain, "{:?}", server.gvote());
    let complaints: Vec<_> = server
        .gvote()
        .into_iter()
        .filter(|line| line.starts_with("gvote: sequence") && !line.contains(" -> "))
        .collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    assert_eq!(server.votes(), 5, "also after a state came back: {:?}", server.gvote());

    // by itself gvote leaves such short answers alone
    let server = Server::start(&flags, Some(&[]));
    assert_eq!(requests(&server), plain, "{:?}", server.gvote());
    assert_eq!(server.votes(), 0, "{:?}", server.gvote());
}

#[test]
#[ignore = "needs llama-server: make test-server"]
fn several_clients_a_stream_and_what_goes_wrong() {
    let server = Server::start(&["-c", "4096", "-np", "4"], Some(VOTES));
    // four at once, each voted on
    thread::scope(|scope| {
        for n in 1..=4 {
            let server = &server;
            scope.spawn(move || {
                let (text, _) = server.chat(&[("user", &format!("{}\nWhat is on shelf {n}?", document(n)))], VOTED);
                assert!(!text.trim().is_empty());
            });
        }
    });
    assert_eq!(server.votes(), 4, "{:?}", server.gvote());
    let mut sequences: Vec<String> =
        server.gvote().iter().filter_map(|line| Some(line.split_once("sequence ")?.1[..1].to_owned())).collect();
    sequences.sort();
    assert_eq!(sequences, ["0", "1", "2", "3"]);

    let question = format!("{}\nWhat is on shelf 9?", document(9));
    let mut body = chat(&[("user", &question)], VOTED);
    body["stream"] = true.into();
    let mut answer = agent().post(server.url("/v1/chat/completions")).send_json(&body).unwrap();
    let text = answer.body_mut().read_to_string().unwrap();
    let pieces = text.lines().filter(|line| line.contains("\"content\":\"")).count();
    assert!(pieces >= VOTED as usize / 2, "{text}");
    assert!(text.trim_end().ends_with("data: [DONE]"), "{text}");

    // a client that goes away in the middle of its answer
    body["max_tokens"] = 2000.into();
    let body = body.to_string();
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    write!(stream, "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut lines = BufReader::new(stream).lines();
    assert!(lines.by_ref().map_while(Result::ok).any(|line| line.starts_with("data: ")));
    drop(lines);
    assert!(!server.chat(&[("user", &question)], UNVOTED).0.is_empty());

    // a prompt of more tokens than a slot has
    let long: String = (0..12).map(document).collect();
    let (status, answer) = server.post("/v1/chat/completions", &chat(&[("user", &long)], UNVOTED));
    assert_eq!((status, &answer["error"]["type"]), (400, &"exceed_context_size_error".into()), "{answer}");
    assert!(!server.chat(&[("user", &question)], UNVOTED).0.is_empty());
}

#[test]
#[ignore = "needs llama-server: make test-server"]
fn embeddings_pass_untouched() {
    let server = Server::start(&["-c", "512", "--embeddings", "--pooling", "mean"], Some(VOTES));
    let (status, answer) = server.post("/v1/embeddings", &json!({ "input": "a text" }));
    assert_eq!(status, 200, "{answer}");
    assert!(answer["data"][0]["embedding"].as_array().unwrap().len() > 100);
    let lines = server.gvote();
    assert!(
        !lines.is_empty() && lines.iter().all(|line| line == "gvote: a context stays as it is: it makes embeddings"),
        "{lines:?}"
    );
}
