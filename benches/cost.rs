//! Costs and gains of gvote: `cargo bench --bench cost -- --help`.
//!
//! All variants run in turn in one process; figures are medians.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::{c_int, c_void};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use common::{DATA, Error, median, prefill};
use gvote::llama::{Batch, CacheType, Context, ContextParams, FlashAttention, LlamaError, Model, Token};
use gvote::policy::{Kind, Params};
use gvote::session::CompressReport;
use gvote::{Session, SessionError, SessionParams};
use serde::Serialize;

#[derive(Parser)]
#[command(about, bin_name = "cost")]
struct Cli {
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
    #[command(flatten)]
    model: common::ModelArgs,
    /// Text to read [default: WikiText-2, or random tokens if the model has no tokenizer]
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// Prompt lengths in tokens
    #[arg(short, value_delimiter = ',', default_value = "4096,8192")]
    prompt: Vec<usize>,
    /// Number of tokens in a decoding measurement
    #[arg(short, default_value_t = 32)]
    n: usize,
    /// Repetitions of each prefill
    #[arg(short, default_value_t = 3)]
    repetitions: usize,
    /// Repetitions of each decoding measurement
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    #[arg(short, long, default_value_t = std::thread::available_parallelism().map_or(2, |n| n.get() as i32))]
    threads: i32,
    /// on, off, or the faster of the two for prefill and for decoding (best)
    #[arg(long, default_value = "best")]
    flash_attn: String,
    /// Maximum number of tokens computed at once (ubatch)
    #[arg(long, default_value_t = ContextParams::default().n_ubatch)]
    ubatch_size: u32,
    /// Type of the K cache
    #[arg(long, default_value = "f16")]
    cache_type_k: CacheType,
    /// Type of the V cache
    #[arg(long, default_value = "f16")]
    cache_type_v: CacheType,
    /// Maximum share of the cells that a vote keeps; with random weights a vote may otherwise keep all
    #[arg(long)]
    cap: Option<f64>,
    /// Bandwidth of the memory that holds the cache, in GB/s, to show what share of it each step reaches
    #[arg(long)]
    bandwidth: Option<f64>,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
}

/// Allocator that counts the bytes allocated by Rust code, and their peak.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes every call on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(held, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    // the system can supply zeroed pages without touching them
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(held, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        let held = HELD.fetch_add(size, Ordering::Relaxed) + size;
        PEAK.fetch_max(held, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Returns the peak resident bytes since the last reset, if the kernel reports them.
fn peak_rss(reset: bool) -> Option<f64> {
    if reset {
        std::fs::write("/proc/self/clear_refs", "5").ok()?;
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? * 1024.0)
}

struct Bench<'a> {
    args: &'a Cli,
    model: Model,
    tokens: Vec<Token>,
}

/// A compression and the memory it took.
struct Compression {
    report: CompressReport,
    /// Time from the call to its return.
    took: Duration,
    /// Peak of the Rust heap and ggml's compute buffers.
    counted: f64,
    /// Growth of the resident set.
    resident: Option<f64>,
}

impl Bench<'_> {
    fn context_params(&self, n: usize, flash: FlashAttention) -> ContextParams {
        ContextParams {
            n_ctx: (n + (self.args.rounds + 1) * self.args.n + 64) as u32,
            n_threads: self.args.threads,
            n_threads_batch: self.args.threads,
            n_ubatch: self.args.ubatch_size,
            flash_attn: flash,
            type_k: self.args.cache_type_k,
            type_v: self.args.cache_type_v,
            ..ContextParams::default()
        }
    }

    fn session(&self, kind: Kind, n: usize, flash: FlashAttention) -> Result<Session, SessionError> {
        let mut policy = Params::new(kind);
        if kind != Kind::Full {
            policy.max_cells = self.args.cap.map(|share| (share * n as f64) as usize);
        }
        let params = SessionParams { context: self.context_params(n, flash), policy, ..SessionParams::default() };
        Session::new(&self.model, &params)
    }

    fn prompt(&self, n: usize) -> &[Token] {
        &self.tokens[..n]
    }

    /// Returns the seconds for decoding `n` tokens.
    fn decode(&self, session: &mut Session) -> Result<f64, Error> {
        let start = Instant::now();
        for &token in &self.tokens[..self.args.n] {
            session.decode(token)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }

    fn compress(&self, session: &mut Session) -> Result<Compression, Error> {
        let rss = peak_rss(true);
        let held = HELD.load(Ordering::Relaxed);
        PEAK.store(held, Ordering::Relaxed);
        let start = Instant::now();
        let report = session.compress()?;
        let took = start.elapsed();
        let counted = (PEAK.load(Ordering::Relaxed) - held + report.compute_bytes) as f64;
        let resident = rss.zip(peak_rss(false)).map(|(before, after)| after - before);
        Ok(Compression { report, took, counted, resident })
    }

    /// Returns the faster setting for prefill and for decoding at this depth.
    fn choose_flash(&self, n: usize) -> Result<(FlashAttention, FlashAttention), Error> {
        match self.args.flash_attn.as_str() {
            "on" => return Ok((FlashAttention::On, FlashAttention::On)),
            "off" => return Ok((FlashAttention::Off, FlashAttention::Off)),
            _ => {}
        }
        let mut seconds = Vec::new();
        for flash in [FlashAttention::Off, FlashAttention::On] {
            let mut session = match self.session(Kind::Full, n, flash) {
                Ok(session) => session,
                // the buffers do not fit, or the cache types need the other setting
                Err(SessionError::Llama(error @ (LlamaError::Context { .. } | LlamaError::QuantizedV(_)))) => {
                    eprintln!("{n:>6}  flash attention {flash:?} is left out: {error}");
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            self.warm_up(n, flash)?;
            let read = prefill(&mut session, self.prompt(n))?;
            let wrote = self.decode(&mut session)?;
            let out = self.table(n, "choice", flash);
            out.row("prefill", &[n as f64 / read], "t/s", None)?;
            out.row("decode", &[self.args.n as f64 / wrote], "t/s", None)?;
            seconds.push((flash, read, wrote));
        }
        if seconds.is_empty() {
            return Err(format!("no context for {n} tokens can be made: see above").into());
        }
        let best = |key: fn(&(FlashAttention, f64, f64)) -> f64| {
            seconds.iter().min_by(|a, b| key(a).total_cmp(&key(b))).map_or(FlashAttention::Auto, |s| s.0)
        };
        Ok((best(|s| s.1), best(|s| s.2)))
    }

    /// Reads, votes and decodes once, so that the first run of each kernel, which loads it, is not timed.
    fn warm_up(&self, n: usize, flash: FlashAttention) -> Result<(), Error> {
        let n = n.min(2 * self.args.ubatch_size as usize);
        let mut session = self.session(Kind::Gvote, n, flash)?;
        prefill(&mut session, self.prompt(n))?;
        session.compress()?;
        self.decode(&mut session).map(drop)
    }

    fn prefill_and_vote(&self, n: usize, flash: FlashAttention) -> Result<(), Error> {
        self.warm_up(n, flash)?;
        let (mut off, mut on, mut votes) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.args.repetitions {
            off.push(prefill(&mut self.session(Kind::Full, n, flash)?, self.prompt(n))?);
            let mut session = self.session(Kind::Gvote, n, flash)?;
            on.push(prefill(&mut session, self.prompt(n))?);
            votes.push(self.compress(&mut session)?);
        }
        let ratio: Vec<f64> = on.iter().zip(&off).map(|(on, off)| on / off).collect();
        let out = self.table(n, "prefill", flash);
        out.row("prefill, capture off", &off, "s", None)?;
        out.row("prefill speed, capture off", &off.iter().map(|s| n as f64 / s).collect::<Vec<_>>(), "t/s", None)?;
        out.row("prefill, capture on / off", &ratio, "", Some(1.03))?;
        let part = |f: fn(&CompressReport) -> f64| votes.iter().map(|v| f(&v.report)).collect::<Vec<f64>>();
        out.row("cells after", &part(|r| r.cells_after as f64), "", None)?;
        out.row("probe", &part(|r| 1e3 * r.probe_time.as_secs_f64()), "ms", None)?;
        out.row("score", &part(|r| 1e3 * r.score_time.as_secs_f64()), "ms", None)?;
        out.row("select", &part(|r| 1e3 * r.select_time.as_secs_f64()), "ms", None)?;
        out.row("trial", &part(|r| 1e3 * r.trial_time.as_secs_f64()), "ms", None)?;
        out.row("compact", &part(|r| 1e3 * r.compact_time.as_secs_f64()), "ms", None)?;
        let share = |time: fn(&Compression) -> Duration| {
            let shares = votes.iter().zip(&off).map(|(v, off)| 100.0 * time(v).as_secs_f64() / off);
            shares.collect::<Vec<f64>>()
        };
        let voted = share(|v| v.took - v.report.trial_time);
        out.row("vote and compaction / prefill", &voted, "%", Some(2.0))?;
        let all: Vec<f64> = voted.iter().zip(&ratio).map(|(voted, ratio)| voted + 100.0 * (ratio - 1.0)).collect();
        out.row("capture, vote and compaction / prefill", &all, "%", Some(5.0))?;
        out.row("trial / prefill", &share(|v| v.report.trial_time), "%", None)?;

        // minimum traffic: every key and value is read once, and the kept ones are read and written
        let bytes =
            |f: fn(&CompressReport) -> usize| median(&votes.iter().map(|v| f(&v.report) as f64).collect::<Vec<_>>());
        out.moved("score: K and V read once", bytes(|r| r.kv_bytes_before), &part(|r| r.score_time.as_secs_f64()))?;
        out.moved(
            "compact: rows read and written",
            bytes(|r| 2 * r.kv_bytes_after),
            &part(|r| r.compact_time.as_secs_f64()),
        )?;

        let of_kv = |bytes: f64, v: &Compression| 100.0 * bytes / v.report.kv_bytes_before as f64;
        let counted: Vec<f64> = votes.iter().map(|v| of_kv(v.counted, v)).collect();
        out.row("transient heap and compute / KV", &counted, "%", Some(5.0))?;
        let resident: Vec<f64> = votes.iter().filter_map(|v| Some(of_kv(v.resident?, v))).collect();
        if !resident.is_empty() {
            out.row("growth of resident memory / KV", &resident, "%", None)?;
        }
        Ok(())
    }

    fn decoding(&self, n: usize, flash: FlashAttention) -> Result<(), Error> {
        let mut compressed = self.session(Kind::Gvote, n, flash)?;
        prefill(&mut compressed, self.prompt(n))?;
        let cells = compressed.compress()?.cells_after;
        let bytes_per_cell = compressed.bytes_per_cell().unwrap_or(0);
        let mut short = self.session(Kind::Full, n, flash)?;
        prefill(&mut short, self.prompt(cells))?;
        let mut full = self.session(Kind::Full, n, flash)?;
        prefill(&mut full, self.prompt(n))?;
        let mut plain = Plain::new(self, n, flash, None)?;
        let listener = Listener::new()?;
        let mut heard = Plain::new(self, n, flash, Some(&listener))?;
        let mut seconds: [Vec<f64>; 5] = Default::default();
        for _ in 0..self.args.rounds {
            seconds[0].push(self.decode(&mut compressed)?);
            seconds[1].push(self.decode(&mut short)?);
            seconds[2].push(self.decode(&mut full)?);
            seconds[3].push(plain.decode(self)?);
            seconds[4].push(heard.decode(self)?);
        }
        let rate = |i: usize| seconds[i].iter().map(|s| self.args.n as f64 / s).collect::<Vec<f64>>();
        let ratio = |i: usize, j: usize| seconds[i].iter().zip(&seconds[j]).map(|(a, b)| a / b).collect::<Vec<f64>>();
        let out = self.table(n, "decode", flash);
        out.row(&format!("compressed to {cells} cells"), &rate(0), "t/s", None)?;
        out.row(&format!("full cache of {cells} tokens"), &rate(1), "t/s", None)?;
        out.row(&format!("full cache of {n} tokens"), &rate(2), "t/s", None)?;
        out.row(&format!("llama.cpp alone, {n} tokens"), &rate(3), "t/s", None)?;
        out.row("time compressed / full of as many cells", &ratio(0, 1), "", Some(1.03))?;
        out.row("time --policy full / llama.cpp alone", &ratio(2, 3), "", Some(1.01))?;
        out.row("time with gvote attached / llama.cpp alone", &ratio(4, 3), "", None)?;
        out.row("speedup by compression", &ratio(2, 0), "", None)?;
        let a_token = |i: usize| seconds[i].iter().map(|s| s / self.args.n as f64).collect::<Vec<f64>>();
        let read = |cells: usize| self.model.size() as f64 + (cells * bytes_per_cell) as f64;
        out.moved("compressed: weights and KV read once", read(cells), &a_token(0))?;
        out.moved("full: weights and KV read once", read(n), &a_token(2))?;
        Ok(())
    }

    fn table(&self, prompt: usize, part: &'static str, flash: FlashAttention) -> Table<'_> {
        if !self.args.json {
            println!("{prompt:>6}  {part}, flash attention {flash:?}: median (min .. max)");
        }
        Table { args: self.args, prompt, part, flash_attn: flash == FlashAttention::On }
    }
}

/// llama.cpp without gvote: a context and a decode loop.
struct Plain {
    ctx: Context,
    pos: i32,
    logits: Vec<f32>,
}

impl Plain {
    /// Creates a context. `listener`: a handle to attach, as an application would.
    fn new(bench: &Bench, n: usize, flash: FlashAttention, listener: Option<&Listener>) -> Result<Self, Error> {
        let mut ctx = Context::new(&bench.model, &bench.context_params(n, flash))?;
        listener.map_or(Ok(()), |listener| listener.attach(&ctx))?;
        let mut batch = Batch::new(512);
        for (c, chunk) in bench.prompt(n).chunks(512).enumerate() {
            batch.clear();
            for (i, &token) in chunk.iter().enumerate() {
                batch.add(token, (c * 512 + i) as i32, 0, c * 512 + i + 1 == n)?;
            }
            ctx.decode(&batch)?;
        }
        Ok(Self { ctx, pos: n as i32, logits: Vec::new() })
    }

    fn decode(&mut self, bench: &Bench) -> Result<f64, Error> {
        let mut batch = Batch::new(1);
        let start = Instant::now();
        for &token in &bench.tokens[..bench.args.n] {
            batch.clear();
            batch.add(token, self.pos, 0, true)?;
            self.ctx.decode(&batch)?;
            self.pos += 1;
            // every caller reads the logits
            self.logits.clear();
            self.logits.extend_from_slice(self.ctx.logits()?);
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// A handle of the C interface, attached to a context.
struct Listener(*mut c_void);

unsafe extern "C" {
    fn gvote_new(params: *const c_void, status: *mut c_int) -> *mut c_void;
    fn gvote_free(g: *mut c_void);
    fn gvote_attach(g: *mut c_void, ctx: *mut c_void) -> c_int;
}

impl Listener {
    fn new() -> Result<Self, Error> {
        let mut status = 0;
        // SAFETY: without settings it has the defaults.
        let handle = unsafe { gvote_new(std::ptr::null(), &raw mut status) };
        if handle.is_null() { Err(format!("gvote_new: status {status}").into()) } else { Ok(Self(handle)) }
    }

    fn attach(&self, ctx: &Context) -> Result<(), Error> {
        // SAFETY: both live; the context is not used meanwhile.
        match unsafe { gvote_attach(self.0, ctx.as_ptr().cast()) } {
            0 => Ok(()),
            status => Err(format!("gvote_attach: status {status}").into()),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { gvote_free(self.0) };
    }
}

/// Output of a measurement's figures.
struct Table<'a> {
    args: &'a Cli,
    prompt: usize,
    part: &'static str,
    flash_attn: bool,
}

/// A figure and what it measures.
#[derive(Serialize)]
struct Figure<'a> {
    prompt: usize,
    part: &'a str,
    flash_attn: bool,
    name: &'a str,
    median: f64,
    min: f64,
    max: f64,
    unit: &'a str,
    target: Option<f64>,
}

impl Table<'_> {
    /// Prints a median with its range, and whether it meets the target.
    fn row(&self, name: &str, values: &[f64], unit: &str, target: Option<f64>) -> Result<(), Error> {
        let min = values.iter().copied().fold(f64::INFINITY, f64::min);
        let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let median = median(values);
        if self.args.json {
            let Self { prompt, part, flash_attn, .. } = *self;
            let figure = Figure { prompt, part, flash_attn, name, median, min, max, unit, target };
            println!("{}", serde_json::to_string(&figure)?);
            return Ok(());
        }
        let verdict = match target {
            Some(t) if median <= t => format!("   target {t}: holds"),
            Some(t) => format!("   target {t}: MISSED"),
            None => String::new(),
        };
        println!("        {name:42} {median:>9.3} {unit:4} ({min:.3} .. {max:.3}){verdict}");
        Ok(())
    }

    /// Prints the rate of moving `bytes` bytes in each of the times, and its share of the memory's bandwidth.
    fn moved(&self, name: &str, bytes: f64, seconds: &[f64]) -> Result<(), Error> {
        let rates: Vec<f64> = seconds.iter().map(|s| bytes / s / 1e9).collect();
        self.row(&format!("{name}, {:.3} GB", bytes / 1e9), &rates, "GB/s", None)?;
        if let Some(most) = self.args.bandwidth {
            let shares: Vec<f64> = rates.iter().map(|rate| 100.0 * rate / most).collect();
            self.row(&format!("{name}, of {most} GB/s"), &shares, "%", None)?;
        }
        Ok(())
    }
}

/// Returns tokens to read: from a text, or random ones if the model has no tokenizer. None if the text is missing.
fn tokens(args: &Cli, model: &Model) -> Result<Option<Vec<Token>>, Error> {
    let n = args.prompt.iter().copied().max().unwrap_or(0).max(args.n);
    if let Err(LlamaError::Tokenize) = model.tokenize("", false, false) {
        return Ok(Some(common::random_tokens(model, n)));
    }
    let wikitext = PathBuf::from(DATA).join("wikitext2/wiki.test.raw");
    let path = args.file.as_ref().unwrap_or(&wikitext);
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(_) if args.file.is_none() => return Ok(None),
        Err(error) => return Err(format!("{}: {error}", path.display()).into()),
    };
    let tokens = model.tokenize(&text, true, false)?;
    if tokens.len() < n {
        return Err(format!("{} has {} tokens, and {n} are to be read", path.display(), tokens.len()).into());
    }
    Ok(Some(tokens))
}

fn main() -> Result<(), Error> {
    let args = Cli::parse_from(common::arguments());
    let model = args.model.load()?;
    let Some(tokens) = tokens(&args, &model)? else {
        println!("skipped: WikiText-2 is missing; give a text with -f");
        return Ok(());
    };
    let bench = Bench { args: &args, model, tokens };
    // loads the weights' pages into memory
    bench.session(Kind::Full, 64, FlashAttention::Auto)?.prefill(bench.prompt(64), |_, _| ControlFlow::Continue(()))?;
    if !args.json {
        println!("{}, {} threads", bench.model.description(), args.threads);
    }
    for &n in &args.prompt {
        let (for_prefill, for_decode) = bench.choose_flash(n)?;
        bench.prefill_and_vote(n, for_prefill)?;
        bench.decoding(n, for_decode)?;
    }
    Ok(())
}
