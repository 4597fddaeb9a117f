//! Checks that everything the pages name exists: links, paths, `make` targets, commands, flags, configurations, and names of the C
//! interface.

#[path = "../../../tests/common/cli.rs"]
mod cli;
#[path = "../../../tests/common/help.rs"]
mod help;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use cli::{bare, finish};
use help::{commands, flags_of};

/// Top-level folders; a word that begins with one of them is a path.
const FOLDERS: [&str; 12] =
    [".ci", ".github", "benches", "crates", "docs", "examples", "ffi", "fuzz", "scripts", "src", "tests", "vendor"];
/// Paths created by a build or a developer.
const MADE: [&str; 1] = ["vendor/llama.cpp"];
/// File name endings that a page may use without a folder.
const SOURCES: [&str; 8] = [".rs", ".c", ".cpp", ".hpp", ".h", ".cu", ".py", ".md"];
/// Files of the reader, and one of llama.cpp's programs, which the pinned package omits.
const ELSEWHERE: [&str; 3] = ["app.c", "app.py", "tools/completion/completion.cpp"];

/// Returns the root folder of the workspace.
fn root() -> &'static Path {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    folder.ancestors().nth(2).unwrap()
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Returns the files below a folder, without build outputs.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let is_built =
        |path: &Path| path.ends_with("target") || path.ends_with(".git") || path.ends_with("vendor/llama.cpp");
    let (folders, files): (Vec<_>, Vec<_>) = entries.filter(|path| !is_built(path)).partition(|path| path.is_dir());
    files.into_iter().chain(folders.iter().flat_map(|folder| self::files(folder))).collect()
}

struct Page {
    /// Path relative to the root.
    name: String,
    text: String,
    /// Inline code of the text, each on one line.
    inline: Vec<String>,
    /// Commands of the shell blocks, one per line, without comments.
    shell: Vec<String>,
}

impl Page {
    fn new(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let (mut prose, mut shell, mut language) = (String::new(), String::new(), None);
        for line in text.lines() {
            if let Some(rest) = line.trim_start().strip_prefix("```") {
                language = if language.is_none() { Some(rest.to_owned()) } else { None };
            } else if language.as_deref() == Some("sh") {
                shell += &line.split(" #").next().unwrap().replace('\\', "\\\n");
                shell += "\n";
            } else if language.is_none() {
                prose += line;
                prose += "\n";
            }
        }
        let inline =
            prose.split('`').skip(1).step_by(2).map(|code| code.split_whitespace().collect::<Vec<_>>().join(" "));
        let shell = shell.replace("\\\n\n", " ").replace("\\\n", "\\");
        Self {
            name: path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned(),
            inline: inline.collect(),
            shell: shell.lines().flat_map(|line| line.split(['|', ';'])).map(|line| line.trim().to_owned()).collect(),
            text,
        }
    }

    /// Returns the commands in the text and in blocks, each as a list of words.
    fn commands(&self) -> impl Iterator<Item = Vec<String>> {
        self.inline.iter().chain(&self.shell).flat_map(|line| line.split("&&")).map(words)
    }
}

/// Returns all pages of the repository.
fn pages() -> Vec<Page> {
    // the notes are part of docs/results.md
    let files = files(root()).into_iter().filter(|path| !path.ends_with("docs/results/notes.md"));
    let files = files.filter(|path| path.extension().is_some_and(|ending| ending == "md"));
    let pages: Vec<Page> = files.map(|path| Page::new(&path)).collect();
    assert!(pages.len() > 15, "{}", pages.len());
    pages
}

/// Splits a command into words, without quotes, leading variables, and brackets around optional parts.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut quote) = (vec![String::new()], None);
    for c in line.chars() {
        match (c, quote) {
            ('\'' | '"', None) => quote = Some(c),
            (_, Some(open)) if c == open => quote = None,
            (' ', None) => words.push(String::new()),
            ('[' | ']', None) => {}
            _ => words.last_mut().unwrap().push(c),
        }
    }
    let is_variable = |word: &String| word.split_once('=').is_some_and(|(name, _)| is_upper(name));
    words.into_iter().filter(|word| !word.is_empty() && word != "$").skip_while(is_variable).collect()
}

fn is_upper(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c == '_')
}

#[track_caller]
fn assert_none(missing: &BTreeSet<String>) {
    assert!(missing.is_empty(), "\n{}\n", missing.iter().map(String::as_str).collect::<Vec<_>>().join("\n"));
}

/// Returns the anchor of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect::<String>();
    kept.trim().replace(' ', "-")
}

#[test]
fn every_link_leads_somewhere() {
    let mut missing = BTreeSet::new();
    for page in pages() {
        for link in page.text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") {
                continue;
            }
            let (file, place) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => root().join(&page.name),
                file => root().join(&page.name).parent().unwrap().join(file),
            };
            let is_there = target.exists()
                && (place.is_empty()
                    || read(&target)
                        .lines()
                        .any(|line| line.starts_with('#') && anchor(line.trim_start_matches('#')) == place));
            if !is_there {
                missing.insert(format!("{}: {link}", page.name));
            }
        }
    }
    assert_none(&missing);
}

#[test]
fn every_path_exists() {
    let here = files(root());
    let llama = Path::new(env!("GVOTE_LLAMA_SOURCE"));
    let theirs = files(llama);
    let is_named_so = |name: &str| here.iter().chain(&theirs).any(|path| path.ends_with(name));
    let mut missing = BTreeSet::new();
    for page in pages() {
        for code in page.inline.iter().chain(&page.shell) {
            let words =
                code.split([' ', '"', '\'', '=', ',', ':', '(', ')']).map(|word| word.trim_end_matches(['.', '/']));
            for word in words.filter(|word| !word.contains(['*', '$', '{'])) {
                let is_path = word.split_once('/').is_some_and(|(first, _)| FOLDERS.contains(&first));
                let is_there = if is_path {
                    root().join(word).exists() || llama.join(word).exists() || MADE.contains(&word)
                } else {
                    !SOURCES.iter().any(|ending| word.ends_with(ending) && word != *ending)
                        || word.starts_with(['/', '~'])
                        || ELSEWHERE.contains(&word)
                        || is_named_so(word)
                };
                // the reader chooses where results go
                if !is_there && !code.contains(&format!("-o {word}")) {
                    missing.insert(format!("{}: {word}", page.name));
                }
            }
        }
    }
    assert_none(&missing);
}

#[test]
fn every_make_target_exists() {
    let makefile = read("Makefile");
    let targets: BTreeSet<&str> =
        makefile.lines().filter_map(|line| line.split_once(':')).map(|(target, _)| target).collect();
    let mut missing = BTreeSet::new();
    for page in pages() {
        for words in page.commands().filter(|words| words.first().is_some_and(|word| word == "make")) {
            for word in &words[1..] {
                let is_there = match word.split_once('=') {
                    Some((name, _)) => makefile.contains(&format!("$({name})")),
                    None => targets.contains(word.as_str()),
                };
                if !is_there {
                    missing.insert(format!("{}: make {word}", page.name));
                }
            }
        }
    }
    assert_none(&missing);
}

/// Returns every command of the program, with the spellings of its flags.
fn program() -> BTreeMap<String, BTreeSet<String>> {
    let flags = |command: &str| flags_of(command).into_iter().flat_map(|flag| flag.spellings).chain(own()).collect();
    commands("").into_iter().map(|command| (command.clone(), flags(&command))).collect()
}

fn own() -> impl Iterator<Item = String> {
    ["--help", "-h", "--version", "-V"].map(str::to_owned).into_iter()
}

fn is_flag(word: &str) -> bool {
    let name = word.trim_start_matches('-');
    // -D defines a variable for cmake
    word.starts_with('-') && !word.starts_with("-D") && name.starts_with(|c: char| c.is_ascii_alphabetic())
}

/// Returns a flag without its value, and without punctuation after it.
fn spelling(word: &str) -> &str {
    word.split('=').next().unwrap().trim_end_matches([',', '.', ':'])
}

#[test]
fn every_command_and_its_flags_are_taken() {
    let program = program();
    let llama = fs::read_to_string(Path::new(env!("GVOTE_LLAMA_SOURCE")).join("common/arg.cpp")).unwrap();
    // these two pass the flags of the program that they start on
    let is_passed_on = |command: &str, flag: &str| {
        ["with", "serve"].contains(&command) && (flag == "--" || llama.contains(&format!("\"{flag}\"")))
    };
    let mut missing = BTreeSet::new();
    let mut n = 0;
    for page in pages() {
        for words in page.commands().filter(|words| words.len() > 1 && words[0].rsplit('/').next() == Some("gvote")) {
            // skip placeholders, and flags of the program itself
            if is_upper(&words[1]) || own().any(|flag| flag == words[1]) {
                continue;
            }
            n += 1;
            let two = words[1..].iter().take(2).map(String::as_str).collect::<Vec<_>>().join(" ");
            let Some(flags) = program.get(&two).or_else(|| program.get(&words[1])) else {
                let is_group = program.keys().any(|command| command.starts_with(&format!("{} ", words[1])));
                if !is_group || words.get(2).is_some_and(|word| !is_flag(word)) {
                    missing.insert(format!("{}: gvote {two}", page.name));
                }
                continue;
            };
            for flag in words.iter().filter(|word| is_flag(word)).map(|word| spelling(word)) {
                if !flags.contains(flag) && !is_passed_on(&words[1], flag) {
                    missing.insert(format!("{}: {flag} of gvote {two}", page.name));
                }
            }
        }
    }
    assert!(n > 50, "{n}");
    assert_none(&missing);
}

fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !(c.is_alphanumeric() || "-_".contains(c))).any(|found| found == word)
}

#[test]
fn every_other_flag_is_one_of_the_program_of_a_script_or_of_llama_cpp() {
    let known: BTreeSet<String> = program().into_values().flatten().collect();
    let llama = fs::read_to_string(Path::new(env!("GVOTE_LLAMA_SOURCE")).join("common/arg.cpp")).unwrap();
    let tools = ["scripts", "benches"].iter().flat_map(|folder| files(&root().join(folder)));
    let tools: String = tools.filter_map(|path| fs::read_to_string(path).ok()).collect();
    let is_known =
        |flag: &&str| known.contains(*flag) || llama.contains(&format!("\"{flag}\"")) || has_word(&tools, flag);
    let mut missing = BTreeSet::new();
    for page in pages() {
        for words in page.commands() {
            let Some(first) = words.first() else { continue };
            let flags = words.iter().filter(|word| is_flag(word)).map(|word| spelling(word));
            let unknown: Vec<&str> = if is_flag(first) {
                flags.filter(|flag| !is_known(flag)).collect()
            } else {
                // a script, or one of those packed for a CUDA machine
                let place = first.strip_prefix("./").map_or(first.clone(), |name| format!("benches/gpu/{name}"));
                let text = fs::read_to_string(root().join(place)).unwrap_or_default();
                flags.filter(|flag| !text.is_empty() && !has_word(&text, flag)).collect()
            };
            missing.extend(unknown.iter().map(|flag| format!("{}: {flag} in {}", page.name, words.join(" "))));
        }
    }
    assert_none(&missing);
}

#[test]
fn every_configuration_is_understood() {
    let folder = tempfile::tempdir().unwrap();
    let nothing = folder.path().join("nothing");
    let nothing = nothing.to_str().unwrap();
    let mut configs: BTreeMap<String, String> = BTreeMap::new();
    for page in pages() {
        for words in page.commands() {
            let after = words.windows(2).filter(|pair| pair[0] == "--config").map(|pair| &pair[1]);
            // skip a placeholder for the reader's own policy
            configs.extend(
                after.filter(|config| !config.contains("NAME")).map(|config| (config.clone(), page.name.clone())),
            );
        }
    }
    assert!(configs.len() > 20, "{}", configs.len());
    let mut missing = BTreeSet::new();
    for (config, page) in &configs {
        let done =
            finish(&mut bare(&["eval", "text", "-m", nothing, "-f", nothing, "-o", nothing, "--config", config]));
        assert_ne!(done.status, 0, "nothing is no model");
        if done.status == 2 || !done.stderr.contains("nothing") {
            missing.insert(format!("{page}: --config {config}: {}", done.stderr.trim()));
        }
    }
    assert_none(&missing);
}

#[test]
fn the_results_are_those_of_the_run_files() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("docs")).unwrap();
    std::os::unix::fs::symlink(root().join("docs/results"), folder.path().join("docs/results")).unwrap();
    let mut runs: Vec<PathBuf> = files(&root().join("docs/results"));
    runs.retain(|path| path.extension().is_some_and(|ending| ending == "jsonl"));
    runs.sort();
    let runs = runs.iter().map(|path| path.strip_prefix(root()).unwrap().to_str().unwrap());
    // the same command as in `make results`
    let settings = ["--baseline", "half", "--title", "What was measured", "--notes", "docs/results/notes.md"];
    let args: Vec<&str> = ["eval", "report"].into_iter().chain(runs).chain(settings).collect();
    finish(bare(&args).args(["-o", "docs/results.md"]).current_dir(folder.path())).ok();
    let made = fs::read_to_string(folder.path().join("docs/results.md")).unwrap();
    assert!(made == read("docs/results.md"), "run make results");
}

/// Returns names of the C interface, of its files and of the build's variables.
fn identifiers(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || "_.".contains(c)));
    let names = words.filter(|word| !word.contains(".rs")).flat_map(|word| word.split('.'));
    names.filter(|name| name.starts_with("gvote_") || name.starts_with("GVOTE_")).map(str::to_owned).collect()
}

#[test]
fn every_name_of_the_c_interface_is_declared() {
    let header = read("ffi/gvote.h");
    // the compilers check the code of both headers; their comments are checked like pages
    let (mut code, mut comments) = (String::new(), String::new());
    for (i, part) in header.split("/*").enumerate() {
        let (comment, rest) = if i == 0 { ("", part) } else { part.split_once("*/").unwrap() };
        comments += comment;
        code += rest;
    }
    let (mut wrapper, text) = (String::new(), read("ffi/gvote.hpp"));
    for (line, comment) in text.lines().map(|line| line.split_once("//").unwrap_or((line, ""))) {
        code += line;
        code += "\n";
        wrapper += comment;
    }
    let shim = files(&root().join("ffi")).into_iter().filter(|path| !path.starts_with(root().join("ffi/examples")));
    let shim = shim.filter(|path| !["gvote.h", "gvote.hpp"].iter().any(|header| path.ends_with(header)));
    // what the plugin reads from its environment
    let variables = read("crates/plugin/src/settings.rs");
    let declared = identifiers(&[code, read("build.rs"), variables, shim.map(read).collect()].concat());
    let is_declared = |name: &String| {
        declared.contains(name) || name.ends_with('_') && declared.iter().any(|known| known.starts_with(name.as_str()))
    };
    let headers = [("ffi/gvote.h".to_owned(), comments), ("ffi/gvote.hpp".to_owned(), wrapper)];
    let texts = pages().into_iter().map(|page| (page.name, page.text)).chain(headers);
    let mut missing = BTreeSet::new();
    for (page, text) in texts {
        missing
            .extend(identifiers(&text).iter().filter(|name| !is_declared(name)).map(|name| format!("{page}: {name}")));
    }
    assert_none(&missing);
}
