//! Tries every flag of every command with extreme values: the command must do what the help says, or refuse the value in one line. The
//! flags are taken from the help, so a new flag is tried automatically.

#[path = "../../../tests/common/cli.rs"]
mod cli;
#[path = "../../../tests/common/help.rs"]
mod help;
#[allow(dead_code)] // also used by other tests
#[path = "../../../src/tests/tiny.rs"]
mod tiny;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cli::{PROGRAM, bare, finish};
use gvote::llama;
use help::{Flag, commands, flags_of};

/// Values to try: the limits of every number type that a flag may have, the smallest positive number, and text that is not a number. The
/// bounds and names that a refusal mentions are tried too.
const EXTREMES: [&str; 20] = [
    "",
    "1",
    "-1",
    "-2",
    "65535",
    "2147483647",
    "-2147483648",
    "4294967295",
    "9223372036854775807",
    "-9223372036854775808",
    "18446744073709551615",
    "340282350000000000000000000000000000000",
    "-3.4028235e38",
    "1.7976931348623157e308",
    "1e-45",
    "1.1754944e-38",
    "0.5",
    "nan",
    "inf",
    "-inf",
];

/// Values to try with a flag that takes words.
const WORDS: [&str; 3] = ["", "-1", "nan"];

/// The least work for each command. `MODEL` and `TEXT` stand for files. A tried flag replaces its entry here.
const LINES: &[(&str, &[&str])] = &[
    ("run", &["--model=MODEL", "--file=TEXT", "--predict=2", "--threads=1"]),
    ("chat", &["--model=MODEL", "--file=TEXT", "--predict=2", "--threads=1", "--single-turn"]),
    ("explain", &["--model=MODEL", "--file=TEXT", "--threads=1"]),
    (
        "eval text",
        &["--model=MODEL", "--file=TEXT", "--prompt=160", "--predict=2", "--texts=1", "--threads=1", "--out=new.jsonl"],
    ),
    ("eval tasks", &["--model=MODEL", "--needle", "--needle-words=40", "--limit=1", "--threads=1", "--out=new.jsonl"]),
    ("eval turns", &["--model=MODEL", "--needle", "--needle-words=40", "--limit=1", "--threads=1", "--out=new.jsonl"]),
    (
        "eval adaptivity",
        &["--model=MODEL", "--text=TEXT", "--prompt=160", "--predict=2", "--limit=1", "--threads=1", "--out=new.jsonl"],
    ),
    ("eval report", &["RECORDS"]),
    (
        "bench",
        &[
            "--model=MODEL",
            "--n-prompt=0",
            "--n-gen=1",
            "--n-depth=160",
            "--repetitions=1",
            "--no-warmup",
            "--threads=1",
        ],
    ),
    ("inspect", &["MODEL"]),
    ("plan", &["MODEL"]),
    // the text is not a library: the dynamic linker reports it and continues
    ("with", &["--plugin=TEXT", "--", "true"]),
    ("serve", &["--plugin=TEXT", "--llama-server=/bin/true"]),
    ("rpc-server", &["--port=0", "--threads=1"]),
    ("man", &[]),
];

/// Flags that need other flags, or that other flags exclude.
const BESIDE: &[(&str, &str, &[&str])] = &[
    ("bench", "--memory", &["--n-parallel=1"]),
    ("eval tasks", "--tasks", &["--ruler=RULER"]),
    ("eval turns", "--tasks", &["--ruler=RULER"]),
    ("eval adaptivity", "--tasks", &["--ruler=RULER"]),
];

/// Work without an end of its own; Ctrl-C ends it.
const ENDLESS: &[(&str, &str)] = &[("bench", "--repetitions"), ("chat", "--predict"), ("run", "--predict")];

/// Failures after the report has been printed; the report gives the reason.
const REPORTS: &[(&str, &str)] = &[("plan", "--memory")];

/// Time limit of a command, and how long an endless one is observed.
const DEADLINE: Duration = Duration::from_secs(30);
const WATCHED: Duration = Duration::from_millis(500);
/// A value that takes longer than this in one command is not tried in the others.
const REPEATED: Duration = Duration::from_secs(2);
/// Limits for resident bytes and for address space.
const RESIDENT_MAX: usize = 1 << 30;
const ADDRESSES_MAX: u64 = 8 << 30;

/// Paths of the models and texts.
struct Files {
    folder: tempfile::TempDir,
    model: PathBuf,
    text: PathBuf,
    records: PathBuf,
    ruler: PathBuf,
}

impl Files {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = tiny::sentencepiece(folder.path());
        let text = folder.path().join("text.txt");
        fs::write(&text, cli::text(400)).unwrap();
        let records = folder.path().join("records.jsonl");
        let ruler = folder.path().join("ruler");
        fs::create_dir(&ruler).unwrap();
        let row = r#"{"index": 0, "input": "A text.\nWhat is it?", "answer_prefix": " It is", "outputs": ["it"]}"#;
        fs::write(ruler.join("niah_single_1.jsonl"), row).unwrap();
        let files = Self { folder, model, text, records, ruler };
        let line = files.line("eval text", &[]);
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        finish(bare(&line).current_dir(files.folder.path())).ok();
        fs::rename(files.folder.path().join("new.jsonl"), &files.records).unwrap();
        files
    }

    /// Returns a command's line without the flags that have one of these spellings.
    fn line(&self, command: &str, without: &[String]) -> Vec<String> {
        let (_, flags) = LINES.iter().find(|line| line.0 == command).unwrap_or_else(|| panic!("LINES lacks {command}"));
        let kept = flags.iter().filter(|flag| !without.iter().any(|name| flag.split('=').next() == Some(name)));
        command.split(' ').map(str::to_owned).chain(kept.map(|flag| self.named(flag))).collect()
    }

    /// Replaces placeholders in a word by paths.
    fn named(&self, word: &str) -> String {
        let files = [("MODEL", &self.model), ("TEXT", &self.text), ("RECORDS", &self.records), ("RULER", &self.ruler)];
        files.iter().fold(word.to_owned(), |word, (name, path)| word.replace(name, path.to_str().unwrap()))
    }
}

fn is_in(flags: &[(&str, &str)], flag: &Flag) -> bool {
    flags.contains(&(flag.command.as_str(), flag.spellings[0].as_str()))
}

/// Result of a process.
struct End {
    status: ExitStatus,
    time: Duration,
    was_interrupted: bool,
    was_killed: bool,
    resident: usize,
    stdout: Vec<u8>,
    stderr: String,
}

/// Runs a line in its own folder.
fn run(line: &[String], endless: bool) -> End {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    let outputs = tempfile::tempdir().unwrap();
    let paths = ["stdout", "stderr"].map(|name| outputs.path().join(name));
    let [stdout, stderr] = paths.each_ref().map(|path| File::create(path).unwrap());
    let mut command = Command::new(PROGRAM);
    command.args(line).current_dir(place).env("HOME", place).env("LLAMA_CACHE", place);
    command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    // SAFETY: only calls that are allowed between fork and exec.
    unsafe {
        command.pre_exec(|| {
            let set = |what, n| libc::setrlimit(what, &libc::rlimit { rlim_cur: n, rlim_max: n });
            set(libc::RLIMIT_AS, ADDRESSES_MAX);
            set(libc::RLIMIT_CORE, 0);
            Ok(())
        });
    }
    #[expect(clippy::zombie_processes, reason = "waited for below, by its number: that tells the memory that it took")]
    let child = command.spawn().unwrap();
    let pid = child.id() as libc::pid_t;
    let start = Instant::now();
    let (mut was_interrupted, mut was_killed) = (false, false);
    let mut status = 0;
    // SAFETY: plain numbers, all of which may be zero.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: our own child, which nobody else waits for; both values are written.
    while unsafe { libc::wait4(pid, &raw mut status, libc::WNOHANG, &raw mut usage) } == 0 {
        let time = start.elapsed();
        // SAFETY: the child has not been waited for, so that the number is still its own.
        let send = |signal| unsafe { libc::kill(pid, signal) };
        if endless && !was_interrupted && time > WATCHED && catches_interrupts(pid) {
            was_interrupted = true;
            send(libc::SIGINT);
        } else if time > DEADLINE && !was_killed {
            was_killed = true;
            send(libc::SIGKILL);
        }
        thread::sleep(Duration::from_millis(1));
    }
    let [stdout, stderr] = paths.map(|path| fs::read(path).unwrap());
    End {
        status: ExitStatus::from_raw(status),
        time: start.elapsed(),
        was_interrupted,
        was_killed,
        resident: usize::try_from(usage.ru_maxrss).unwrap() * 1024,
        stdout,
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    }
}

/// Whether a process has installed its handler for Ctrl-C.
fn catches_interrupts(pid: libc::pid_t) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or_default();
    u64::from_str_radix(caught.trim(), 16).is_ok_and(|signals| signals & 1 << (libc::SIGINT - 1) != 0)
}

impl End {
    /// Returns what is wrong with the result, if anything.
    fn fault(&self, flag: &Flag, value: &str) -> Option<String> {
        let errors: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("gvote: ")).collect();
        let last = self.stderr.lines().last().unwrap_or_default();
        let names_it = || {
            let is_file = ["FILE", "FOLDER", "PATH"].contains(&flag.value.as_deref().unwrap_or_default());
            let mut words = last.split(|c: char| c.is_whitespace() || ",;:()='`".contains(c));
            (is_file && last.contains(value)) || words.any(|word| flag.spellings.iter().any(|name| name == word))
        };
        let fault = match self.status.code() {
            _ if self.was_killed => "did not end".to_owned(),
            None => format!("died of signal {}", self.status.signal().unwrap_or_default()),
            _ if self.resident > RESIDENT_MAX => format!("took {} MiB", self.resident >> 20),
            _ if self.stderr.contains("panicked") => "panicked".to_owned(),
            Some(0) if std::str::from_utf8(&self.stdout).is_err() => "stdout is no text".to_owned(),
            Some(0) => return None,
            Some(130) if self.was_interrupted => return None,
            Some(1 | 2) if errors.len() != 1 || errors[0] != last => "did not end with one line of error".to_owned(),
            Some(1 | 2) if !self.stdout.is_empty() && !is_in(REPORTS, flag) => {
                "printed something before it failed".to_owned()
            }
            Some(1 | 2) if !names_it() => "does not name the flag".to_owned(),
            Some(1 | 2) => return None,
            Some(code) => format!("exit status {code}"),
        };
        let said: Vec<&str> = self.stderr.lines().rev().take(3).collect();
        Some(format!("{fault}: {}", said.join(" / ")))
    }

    /// Returns the bounds and names that a refusal mentions.
    fn hints(&self) -> BTreeSet<String> {
        if self.status.code() != Some(2) {
            return BTreeSet::new();
        }
        let words = |text: &str| {
            text.split(|c: char| c.is_whitespace() || ",;()[]'\"".contains(c)).map(str::to_owned).collect::<Vec<_>>()
        };
        let names = ["possible values: ", "one of "].iter().filter_map(|lead| self.stderr.split_once(lead));
        let names = names.flat_map(|(_, list)| words(list.split([']', ';']).next().unwrap_or_default()));
        let bounds = words(&self.stderr)
            .into_iter()
            .flat_map(|word| word.split("..").map(|n| n.trim_start_matches('=').to_owned()).collect::<Vec<_>>());
        let bounds = bounds.filter(|word| word.parse::<f64>().is_ok());
        names.chain(bounds).filter(|word| !word.is_empty()).collect()
    }
}

/// Results of trying a flag.
#[derive(Default)]
struct Tried {
    faults: Vec<String>,
    /// Values that the command accepted quickly.
    taken: Vec<String>,
    hints: BTreeSet<String>,
}

impl Tried {
    /// Tries a flag with a value, or without one.
    fn attempt(&mut self, flag: &Flag, value: Option<&str>, files: &Files) -> End {
        let long = &flag.spellings[0];
        let endless = flag.command == "rpc-server" || is_in(ENDLESS, flag);
        let beside = BESIDE.iter().find(|entry| is_in(&[(entry.0, entry.1)], flag)).map_or(&[][..], |entry| entry.2);
        let mut replaced = flag.spellings.clone();
        replaced.extend(beside.iter().filter_map(|other| other.split('=').next().map(str::to_owned)));
        let mut line = files.line(&flag.command, &replaced);
        // before arguments of another program
        let at = flag.command.split(' ').count();
        line.splice(at..at, beside.iter().map(|&word| files.named(word)));
        // BACK,FORWARD takes two values; N,... takes any number of them
        let parts = flag.value.as_deref().map_or(1, |name| name.split(',').filter(|part| *part != "...").count());
        line.insert(at, value.map_or_else(|| long.clone(), |value| format!("{long}={}", vec![value; parts].join(","))));

        let end = run(&line, endless);
        if let Some(fault) = end.fault(flag, value.unwrap_or_default()) {
            self.faults.push(format!("gvote {}: {fault}", line.join(" ")));
        }
        self.hints.append(&mut end.hints());
        if end.status.code() != Some(2) && end.time < REPEATED {
            self.taken.extend(value.map(str::to_owned));
        }
        end
    }

    /// Tries a flag with all values.
    fn everything(flag: &Flag, files: &Files) -> Self {
        let mut tried = Self::default();
        if flag.value.is_none() {
            tried.attempt(flag, None, files);
            return tried;
        }
        let told = ["0", "x"].map(|value| {
            let end = tried.attempt(flag, Some(value), files);
            (end.status.code(), end.stderr.replace(value, ""))
        });
        // a flag that treats a number and a word alike takes words
        let values = if told[0] == told[1] { &WORDS[..] } else { &EXTREMES[..] };
        for value in values {
            tried.attempt(flag, Some(value), files);
        }
        for value in tried.hints.clone().iter().filter(|hint| !values.contains(&hint.as_str())) {
            tried.attempt(flag, Some(value), files);
        }
        tried
    }

    /// Returns zero, the smallest and the largest number, and every word that was accepted.
    fn ends(&self) -> Vec<Option<&str>> {
        let number = |value: &str| value.parse::<f64>().ok().filter(|x| !x.is_nan());
        let taken = || self.taken.iter().map(String::as_str);
        let numbers = || taken().filter_map(|value| Some((number(value)?, value)));
        let ends = [numbers().min_by(|a, b| a.0.total_cmp(&b.0)), numbers().max_by(|a, b| a.0.total_cmp(&b.0))];
        let mut ends: Vec<&str> = ends.into_iter().flatten().map(|(_, value)| value).collect();
        ends.extend(taken().filter(|&value| value == "0" || number(value).is_none()));
        ends.sort_unstable();
        ends.dedup();
        ends.into_iter().map(Some).collect()
    }
}

/// Tries a flag of several commands: with all values in one command, and in the others with the extremes of what that one accepted.
fn try_flag(flags: &[Flag], files: &Files) -> Vec<String> {
    let (first, others) = flags.split_first().expect("a command has it");
    let mut tried = Tried::everything(first, files);
    let ends = if first.value.is_some() { tried.ends() } else { vec![None] };
    let mut elsewhere = Tried::default();
    for other in others {
        for value in &ends {
            elsewhere.attempt(other, *value, files);
        }
    }
    tried.faults.append(&mut elsewhere.faults);
    tried.faults
}

#[test]
fn every_flag_at_its_extremes_works_or_is_refused_in_one_line() {
    let files = Files::new();
    let mut shared: BTreeMap<String, Vec<Flag>> = BTreeMap::new();
    for flag in commands("").iter().flat_map(|command| flags_of(command)) {
        shared.entry(flag.entry.clone()).or_default().push(flag);
    }
    let n: usize = shared.values().map(Vec::len).sum();
    assert!(n > 400, "{n} flags");
    let shared: Vec<Vec<Flag>> = shared.into_values().collect();
    let (next, faults) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(flags) = shared.get(next.fetch_add(1, Ordering::Relaxed)) {
                    faults.lock().unwrap().extend(try_flag(flags, &files));
                }
            });
        }
    });
    let faults = faults.into_inner().unwrap();
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}
