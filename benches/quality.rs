//! Quality of a compressed cache against the full one: `cargo bench --bench quality -- text|ruler --help`.
//!
//! `text`: teacher-forced continuations of WikiText-2 (KL, perplexity ratio, same top token).
//! `ruler`: RULER tasks with the question in sight (share of the expected strings found in a greedy answer).
//!
//! Each prompt is read once; every configuration starts from the saved full cache.

mod common;

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use common::{DATA, Error, mean, prefill, quantile};
use gvote::llama::{CacheType, ChatTemplate, FlashAttention, Message, Model, Role, Sampler, SamplerParams, Token};
use gvote::policy::{Evict, Kind, Params, Preset};
use gvote::{Session, SessionParams};
use serde_json::{Value, json};

#[derive(Parser)]
#[command(about, bin_name = "quality")]
struct Cli {
    /// Passed by `cargo bench`
    #[arg(long, hide = true, global = true)]
    bench: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// KL and perplexity ratio on WikiText-2 continuations
    Text(Text),
    /// RULER tasks, question in sight
    Ruler(Ruler),
}

#[derive(Args)]
struct Common {
    #[arg(short, long, default_value_os_t = common::default_model())]
    model: PathBuf,
    #[arg(short, long, default_value_t = std::thread::available_parallelism().map_or(2, |n| n.get() as i32))]
    threads: i32,
    #[arg(long, default_value = "auto", value_parser = common::flash_attention)]
    flash_attn: FlashAttention,
    /// Type of the K and V cache
    #[arg(long, default_value = "f16")]
    cache_type: CacheType,
    /// NAME:KEY=VALUE,...  Keys: policy, lost-mass, evict, ratio (exact share kept), span (back-forward), samples, pool,
    /// head-mix, seed, key-error
    #[arg(long, value_parser = Config::parse)]
    config: Vec<Config>,
    /// Append every measurement to this file, and skip what is in it already
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Args)]
struct Text {
    #[command(flatten)]
    common: Common,
    #[arg(short, value_delimiter = ',', default_value = "2048,4096")]
    prompt: Vec<usize>,
    #[arg(short, default_value_t = 256)]
    n: usize,
    /// Texts, evenly spread over the file
    #[arg(long, default_value_t = 4)]
    texts: usize,
    #[arg(long, value_delimiter = ',', default_value = "0,1,2")]
    seeds: Vec<u64>,
}

#[derive(Args)]
struct Ruler {
    #[command(flatten)]
    common: Common,
    #[arg(long, default_value_t = 2048)]
    length: usize,
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multikey_3,\
                         niah_multivalue,niah_multiquery,vt,fwe"
    )]
    tasks: Vec<String>,
    #[arg(long, default_value_t = 25)]
    samples: usize,
    /// First sample
    #[arg(long, default_value_t = 0)]
    offset: usize,
}

/// One way to compress.
#[derive(Clone, Debug)]
struct Config {
    name: String,
    params: Params,
    key_error: bool,
    ratio: Option<f64>,
}

impl Config {
    fn parse(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let pairs: Vec<(&str, &str)> = rest
            .split(',')
            .filter(|s| !s.is_empty())
            .map(|s| s.split_once('=').ok_or(format!("{s}: KEY=VALUE expected")))
            .collect::<Result<_, _>>()?;
        let kind = pairs.iter().find(|p| p.0 == "policy").map_or("gvote", |p| p.1);
        let mut config = Self {
            name: name.into(),
            params: Params::new(kind.parse().map_err(|e| format!("{e}"))?),
            key_error: false,
            ratio: None,
        };
        let p = &mut config.params;
        for (key, value) in pairs {
            let bad = |e: &dyn std::fmt::Display| format!("{key}={value}: {e}");
            match key {
                "policy" => {}
                "lost-mass" => p.lost_mass = value.parse().map_err(|e| bad(&e))?,
                "evict" => p.evict = value.parse().map_err(|e| bad(&e))?,
                "ratio" => config.ratio = Some(value.parse().map_err(|e| bad(&e))?),
                "span" => p.span = value.replace('-', ",").parse().map_err(|e| bad(&e))?,
                "samples" => p.samples = value.parse().map_err(|e| bad(&e))?,
                "pool" => p.pool = value.parse().map_err(|e| bad(&e))?,
                "head-mix" => p.head_mix = value.parse().map_err(|e| bad(&e))?,
                "seed" => p.seed = value.parse().map_err(|e| bad(&e))?,
                "key-error" => config.key_error = value.parse().map_err(|e| bad(&e))?,
                _ => return Err(format!("{key}: no such key")),
            }
        }
        Ok(config)
    }

    fn defaults() -> Vec<Self> {
        let mut all: Vec<Self> = Preset::ALL
            .iter()
            .map(|preset| Self {
                name: preset.name().into(),
                params: Params { lost_mass: preset.lost_mass(), ..Params::default() },
                key_error: false,
                ratio: None,
            })
            .collect();
        all.push(Self {
            name: "balanced cells".into(),
            params: Params { evict: Evict::Cells, ..Params::default() },
            ..all[1].clone()
        });
        all.push(Self { name: "gvote-paper".into(), params: Params::new(Kind::GvotePaper), ..all[1].clone() });
        all
    }

    /// The settings for a prompt of `n` tokens.
    fn for_prompt(&self, n: usize, seed: Option<u64>) -> Params {
        let mut params = self.params.clone();
        if let Some(ratio) = self.ratio {
            let cells = (n as f64 * ratio).round() as usize;
            params.min_cells = cells;
            params.max_cells = Some(cells);
        }
        if let Some(seed) = seed {
            params.seed = seed;
        }
        params
    }
}

impl Common {
    fn configs(&self) -> Vec<Config> {
        if self.config.is_empty() { Config::defaults() } else { self.config.clone() }
    }

    fn session(&self, model: &Model, n_ctx: usize) -> Result<Session, Error> {
        let mut params = SessionParams::default();
        params.context.n_ctx = n_ctx as u32;
        params.context.n_threads = self.threads;
        params.context.n_threads_batch = self.threads;
        params.context.flash_attn = self.flash_attn;
        params.context.type_k = self.cache_type;
        params.context.type_v = self.cache_type;
        Ok(Session::new(model, &params)?)
    }

    fn journal(&self) -> Result<Journal, Error> {
        let mut records = Vec::new();
        if let Some(path) = &self.out
            && let Ok(file) = File::open(path)
        {
            for line in BufReader::new(file).lines() {
                records.push(serde_json::from_str(&line?)?);
            }
        }
        let file = match &self.out {
            Some(path) => Some(OpenOptions::new().create(true).append(true).open(path)?),
            None => None,
        };
        Ok(Journal { done: records.iter().map(Journal::key).collect(), records, file })
    }
}

/// The measurements so far.
struct Journal {
    records: Vec<Value>,
    done: HashSet<String>,
    file: Option<File>,
}

impl Journal {
    fn key(record: &Value) -> String {
        format!("{} {} {} {}", record["item"], record["n"], record["config"], record["seed"])
    }

    fn add(&mut self, record: Value) -> Result<(), Error> {
        if let Some(file) = &mut self.file {
            writeln!(file, "{record}")?;
        }
        self.done.insert(Self::key(&record));
        self.records.push(record);
        Ok(())
    }

    fn has(&self, item: &str, n: usize, config: &str, seed: u64) -> bool {
        let key = json!({"item": item, "n": n, "config": config, "seed": seed});
        self.done.contains(&Self::key(&key))
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    let log_sum = max + sum.ln() as f32;
    logits.iter().map(|l| l - log_sum).collect()
}

fn top(values: &[f32]) -> usize {
    (0..values.len()).max_by(|&a, &b| values[a].total_cmp(&values[b])).unwrap_or(0)
}

/// Log-probabilities at every step of a teacher-forced continuation. `[n][n_vocab]`
fn continuation(session: &mut Session, tokens: &[Token]) -> Result<Vec<Vec<f32>>, Error> {
    let mut out = Vec::with_capacity(tokens.len());
    for &token in tokens {
        session.decode(token)?;
        out.push(log_softmax(session.logits()));
    }
    Ok(out)
}

fn text(args: &Text) -> Result<(), Error> {
    let path = PathBuf::from(DATA).join("wikitext2/wiki.test.raw");
    let Ok(text) = std::fs::read_to_string(&path) else {
        println!("skipped: {} is missing", path.display());
        return Ok(());
    };
    let model = common::load_model(&args.common.model)?;
    let tokens = model.tokenize(&text, true, false)?;
    let mut journal = args.common.journal()?;
    for &n in &args.prompt {
        let mut session = args.common.session(&model, n + args.n + 8)?;
        for t in 0..args.texts {
            let item = format!("text {t}");
            let start = t * (tokens.len() - n - args.n - 1) / args.texts.max(2);
            let prompt = &tokens[start..start + n];
            // the first token comes from the full cache: it tells nothing about the compressed one
            let fed = &tokens[start + n..start + n + args.n];
            let target = &tokens[start + n + 1..start + n + args.n + 1];
            session.clear();
            let seconds = prefill(&mut session, prompt)?;
            eprintln!("{item} n={n}: prefill {seconds:.1} s");
            let saved = session.save();
            let full = continuation(&mut session, fed)?;
            for config in args.common.configs() {
                for &seed in &args.seeds {
                    if journal.has(&item, n, &config.name, seed) {
                        continue;
                    }
                    session.load(&saved)?;
                    session.set_policy(config.for_prompt(n, Some(seed)), config.key_error)?;
                    let report = session.compress()?;
                    let got = continuation(&mut session, fed)?;
                    let mut kl = Vec::new();
                    let (mut nll, mut same) = (0.0, 0.0);
                    for ((p, q), &next) in full.iter().zip(&got).zip(target) {
                        kl.push(p.iter().zip(q).map(|(p, q)| f64::from(p.exp()) * f64::from(p - q)).sum::<f64>());
                        nll += f64::from(p[next as usize] - q[next as usize]);
                        same += f64::from(u8::from(top(p) == top(q)));
                    }
                    journal.add(json!({
                        "item": item, "n": n, "config": config.name, "seed": seed,
                        "kl": mean(&kl), "kl_median": quantile(&kl, 0.5), "kl_p90": quantile(&kl, 0.9),
                        "log_ppl_ratio": nll / fed.len() as f64, "same_top": same / fed.len() as f64,
                        "share": report.share(), "lost_mass": report.lost_mass, "seconds": report.time().as_secs_f64(),
                    }))?;
                }
            }
        }
    }
    println!(
        "{:>6}  {:20} {:>7} {:>8} {:>8} {:>8} {:>9} {:>8} {:>9}",
        "prompt", "config", "kept %", "KL mean", "median", "p90", "ppl ratio", "same top", "seed sd"
    );
    for &n in &args.prompt {
        for config in args.common.configs() {
            let rows: Vec<&Value> =
                journal.records.iter().filter(|r| r["n"] == json!(n) && r["config"] == json!(config.name)).collect();
            if rows.is_empty() {
                continue;
            }
            let column = |name: &str| -> Vec<f64> { rows.iter().filter_map(|r| r[name].as_f64()).collect() };
            // spread of the mean KL between seeds
            let by_seed: Vec<f64> = args
                .seeds
                .iter()
                .map(|s| {
                    mean(
                        &rows
                            .iter()
                            .filter(|r| r["seed"] == json!(s))
                            .filter_map(|r| r["kl"].as_f64())
                            .collect::<Vec<_>>(),
                    )
                })
                .collect();
            let centre = mean(&by_seed);
            let sd = mean(&by_seed.iter().map(|k| (k - centre).powi(2)).collect::<Vec<_>>()).sqrt();
            println!(
                "{n:>6}  {:20} {:>7.1} {:>8.4} {:>8.4} {:>8.4} {:>9.4} {:>7.1}% {:>9.4}",
                config.name,
                100.0 * mean(&column("share")),
                mean(&column("kl")),
                mean(&column("kl_median")),
                mean(&column("kl_p90")),
                mean(&column("log_ppl_ratio")).exp(),
                100.0 * mean(&column("same_top")),
                sd,
            );
        }
    }
    Ok(())
}

/// Tokens that an answer may have, as RULER itself allows.
fn answer_length(task: &str) -> i32 {
    match task {
        "vt" => 30,
        "fwe" => 50,
        _ => 128,
    }
}

fn answer(session: &mut Session, n_predict: i32) -> Result<String, Error> {
    let mut sampler = Sampler::new(session.model(), &SamplerParams { temp: 0.0, ..SamplerParams::default() });
    let mut tokens = Vec::new();
    session.generate(&mut sampler, n_predict, |token| {
        tokens.push(token);
        ControlFlow::Continue(())
    })?;
    Ok(session.model().detokenize(&tokens, false))
}

fn score(answer: &str, outputs: &[Value]) -> f64 {
    let answer = answer.to_lowercase();
    let found = outputs.iter().filter(|o| o.as_str().is_some_and(|o| answer.contains(&o.to_lowercase()))).count();
    found as f64 / outputs.len() as f64
}

fn ruler(args: &Ruler) -> Result<(), Error> {
    let folder = PathBuf::from(DATA).join("ruler").join(args.length.to_string());
    if !folder.is_dir() {
        println!("skipped: {} is missing", folder.display());
        return Ok(());
    }
    let model = common::load_model(&args.common.model)?;
    let template = ChatTemplate::of(&model);
    let mut journal = args.common.journal()?;
    let configs = args.common.configs();
    let mut session = args.common.session(&model, args.length + 1024)?;
    for task in &args.tasks {
        let file = BufReader::new(File::open(folder.join(format!("{task}.jsonl")))?);
        for (i, line) in file.lines().enumerate().skip(args.offset).take(args.samples) {
            let sample: Value = serde_json::from_str(&line?)?;
            let item = format!("{task} {i}");
            let names = || std::iter::once("full").chain(configs.iter().map(|c| c.name.as_str()));
            if names().all(|name| journal.has(&item, args.length, name, 0)) {
                continue;
            }
            let text = |key: &str| sample[key].as_str().unwrap_or_default().to_owned();
            let prompt = template.render(&[Message::new(Role::User, text("input"))], true)? + &text("answer_prefix");
            let tokens = model.tokenize(&prompt, model.adds_bos(), true)?;
            session.clear();
            let seconds = prefill(&mut session, &tokens)?;
            let saved = session.save();
            let outputs = sample["outputs"].as_array().cloned().unwrap_or_default();
            let mut measure = |session: &mut Session, name: &str, share: f64| -> Result<f64, Error> {
                let answer = answer(session, answer_length(task))?;
                let score = score(&answer, &outputs);
                journal.add(json!({
                    "item": item, "task": task, "n": args.length, "config": name, "seed": 0,
                    "tokens": tokens.len(), "score": score, "share": share, "answer": answer,
                }))?;
                Ok(score)
            };
            let full = measure(&mut session, "full", 1.0)?;
            eprint!("{item}: prefill {seconds:.1} s, full {full:.2}");
            for config in &configs {
                session.load(&saved)?;
                session.set_policy(config.for_prompt(tokens.len(), None), config.key_error)?;
                let share = session.compress()?.share();
                let score = measure(&mut session, &config.name, share)?;
                eprint!(", {} {score:.2} at {:.0} %", config.name, 100.0 * share);
            }
            eprintln!();
        }
    }
    ruler_table(&journal, args, &configs);
    Ok(())
}

fn ruler_table(journal: &Journal, args: &Ruler, configs: &[Config]) {
    let mut names = vec!["full"];
    names.extend(configs.iter().map(|c| c.name.as_str()));
    print!("{:16}", "task");
    for name in &names {
        print!(" {name:>16}");
    }
    println!();
    let mut totals: BTreeMap<&str, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for task in &args.tasks {
        print!("{task:16}");
        for name in &names {
            let rows = || {
                journal.records.iter().filter(move |r| {
                    r["task"] == json!(task) && r["config"] == json!(name) && r["n"] == json!(args.length)
                })
            };
            let scores: Vec<f64> = rows().filter_map(|r| r["score"].as_f64()).collect();
            let shares: Vec<f64> = rows().filter_map(|r| r["share"].as_f64()).collect();
            if scores.is_empty() {
                continue;
            }
            print!(" {:>7.1} at {:>4.0} %", 100.0 * mean(&scores), 100.0 * mean(&shares));
            let total = totals.entry(name).or_default();
            total.0.push(mean(&scores));
            total.1.push(mean(&shares));
        }
        println!();
    }
    print!("{:16}", "mean");
    for name in &names {
        if let Some((scores, shares)) = totals.get(name) {
            print!(" {:>7.1} at {:>4.0} %", 100.0 * mean(scores), 100.0 * mean(shares));
        }
    }
    println!();
}

fn main() -> Result<(), Error> {
    match Cli::parse().command {
        Command::Text(args) => text(&args),
        Command::Ruler(args) => ruler(&args),
    }
}
