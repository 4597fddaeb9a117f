//! What gvote costs and what it buys: `cargo bench --bench cost -- --help`.
//!
//! Everything that is compared runs in one process, in turn; figures are medians.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use common::{DATA, Error, median, prefill};
use gvote::llama::{Batch, Context, ContextParams, FlashAttention, Model, Token};
use gvote::policy::{Kind, Params};
use gvote::session::CompressReport;
use gvote::{Session, SessionParams};

#[derive(Parser)]
#[command(about, bin_name = "cost")]
struct Cli {
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
    #[arg(short, long, default_value_os_t = common::default_model())]
    model: PathBuf,
    /// Prompt lengths, tokens
    #[arg(short, value_delimiter = ',', default_value = "4096,8192")]
    prompt: Vec<usize>,
    /// Tokens of a decoding measurement
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
}

/// Counts the heap that Rust code holds, and its peak.
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

/// Peak resident bytes since the last reset, where the kernel tells.
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

/// One compression with the memory it took.
struct Compression {
    report: CompressReport,
    /// Rust heap and ggml's compute buffers, at their largest.
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
            flash_attn: flash,
            ..ContextParams::default()
        }
    }

    fn session(&self, kind: Kind, n: usize, flash: FlashAttention) -> Result<Session, Error> {
        let params = SessionParams {
            context: self.context_params(n, flash),
            policy: Params::new(kind),
            ..SessionParams::default()
        };
        Ok(Session::new(&self.model, &params)?)
    }

    fn prompt(&self, n: usize) -> &[Token] {
        &self.tokens[..n]
    }

    /// Seconds for `n` tokens of decoding.
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
        let report = session.compress()?;
        let counted = (PEAK.load(Ordering::Relaxed) - held + report.compute_bytes) as f64;
        let resident = rss.zip(peak_rss(false)).map(|(before, after)| after - before);
        Ok(Compression { report, counted, resident })
    }

    /// The faster setting for prefill and for decoding at this depth.
    fn choose_flash(&self, n: usize) -> Result<(FlashAttention, FlashAttention), Error> {
        match self.args.flash_attn.as_str() {
            "on" => return Ok((FlashAttention::On, FlashAttention::On)),
            "off" => return Ok((FlashAttention::Off, FlashAttention::Off)),
            _ => {}
        }
        let mut seconds = Vec::new();
        for flash in [FlashAttention::Off, FlashAttention::On] {
            let mut session = self.session(Kind::Full, n, flash)?;
            let read = prefill(&mut session, self.prompt(n))?;
            let wrote = self.decode(&mut session)?;
            println!(
                "{n:>6}  flash attention {flash:?}: prefill {:.0} t/s, decode {:.1} t/s",
                n as f64 / read,
                self.args.n as f64 / wrote
            );
            seconds.push((flash, read, wrote));
        }
        let best = |key: fn(&(FlashAttention, f64, f64)) -> f64| {
            seconds.iter().min_by(|a, b| key(a).total_cmp(&key(b))).map_or(FlashAttention::Off, |s| s.0)
        };
        Ok((best(|s| s.1), best(|s| s.2)))
    }

    fn prefill_and_vote(&self, n: usize, flash: FlashAttention) -> Result<(), Error> {
        let (mut off, mut on, mut votes) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.args.repetitions {
            off.push(prefill(&mut self.session(Kind::Full, n, flash)?, self.prompt(n))?);
            let mut session = self.session(Kind::Gvote, n, flash)?;
            on.push(prefill(&mut session, self.prompt(n))?);
            votes.push(self.compress(&mut session)?);
        }
        let ratio: Vec<f64> = on.iter().zip(&off).map(|(on, off)| on / off).collect();
        println!("{n:>6}  flash attention {flash:?}, median of {} (min .. max)", self.args.repetitions);
        row("prefill, capture off", &off, "s", None);
        row("prefill, capture on / off", &ratio, "", Some(1.03));
        let part = |f: fn(&CompressReport) -> f64| votes.iter().map(|v| f(&v.report)).collect::<Vec<f64>>();
        row("probe", &part(|r| 1e3 * r.probe_time.as_secs_f64()), "ms", None);
        row("score", &part(|r| 1e3 * r.score_time.as_secs_f64()), "ms", None);
        row("select", &part(|r| 1e3 * r.select_time.as_secs_f64()), "ms", None);
        row("trial", &part(|r| 1e3 * r.trial_time.as_secs_f64()), "ms", None);
        row("compact", &part(|r| 1e3 * r.compact_time.as_secs_f64()), "ms", None);
        let share = |time: fn(&CompressReport) -> Duration| {
            let shares = votes.iter().zip(&off).map(|(v, off)| 100.0 * time(&v.report).as_secs_f64() / off);
            shares.collect::<Vec<f64>>()
        };
        row("vote and compaction / prefill", &share(|r| r.time() - r.trial_time), "%", Some(2.0));
        row("trial / prefill", &share(|r| r.trial_time), "%", None);
        let of_kv = |bytes: f64, v: &Compression| 100.0 * bytes / v.report.kv_bytes_before as f64;
        let counted: Vec<f64> = votes.iter().map(|v| of_kv(v.counted, v)).collect();
        row("transient heap and compute / KV", &counted, "%", Some(5.0));
        let resident: Vec<f64> = votes.iter().filter_map(|v| Some(of_kv(v.resident?, v))).collect();
        if !resident.is_empty() {
            row("growth of resident memory / KV", &resident, "%", None);
        }
        Ok(())
    }

    fn decoding(&self, n: usize, flash: FlashAttention) -> Result<(), Error> {
        let mut compressed = self.session(Kind::Gvote, n, flash)?;
        prefill(&mut compressed, self.prompt(n))?;
        let cells = compressed.compress()?.cells_after;
        let mut short = self.session(Kind::Full, n, flash)?;
        prefill(&mut short, self.prompt(cells))?;
        let mut full = self.session(Kind::Full, n, flash)?;
        prefill(&mut full, self.prompt(n))?;
        let mut plain = Plain::new(self, n, flash)?;
        let mut seconds: [Vec<f64>; 4] = Default::default();
        for _ in 0..self.args.rounds {
            seconds[0].push(self.decode(&mut compressed)?);
            seconds[1].push(self.decode(&mut short)?);
            seconds[2].push(self.decode(&mut full)?);
            seconds[3].push(plain.decode(self)?);
        }
        let rate = |i: usize| seconds[i].iter().map(|s| self.args.n as f64 / s).collect::<Vec<f64>>();
        let ratio = |i: usize, j: usize| seconds[i].iter().zip(&seconds[j]).map(|(a, b)| a / b).collect::<Vec<f64>>();
        println!("{n:>6}  decoding, flash attention {flash:?}, median of {} (min .. max)", self.args.rounds);
        row(&format!("compressed to {cells} cells"), &rate(0), "t/s", None);
        row(&format!("full cache of {cells} tokens"), &rate(1), "t/s", None);
        row(&format!("full cache of {n} tokens"), &rate(2), "t/s", None);
        row(&format!("llama.cpp alone, {n} tokens"), &rate(3), "t/s", None);
        row("time compressed / full of as many cells", &ratio(0, 1), "", Some(1.03));
        row("time --policy full / llama.cpp alone", &ratio(2, 3), "", Some(1.01));
        row("speedup by compression", &ratio(2, 0), "", None);
        Ok(())
    }
}

/// llama.cpp without gvote: a context and its decode loop.
struct Plain {
    ctx: Context,
    pos: i32,
    logits: Vec<f32>,
}

impl Plain {
    fn new(bench: &Bench, n: usize, flash: FlashAttention) -> Result<Self, Error> {
        let mut ctx = Context::new(&bench.model, &bench.context_params(n, flash))?;
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
            // any caller reads the logits
            self.logits.clear();
            self.logits.extend_from_slice(self.ctx.logits()?);
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Prints a median with its range, and whether it holds the target.
fn row(name: &str, values: &[f64], unit: &str, target: Option<f64>) {
    let min = values.iter().copied().fold(f64::INFINITY, f64::min);
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let middle = median(values);
    let verdict = match target {
        Some(t) if middle <= t => format!("   target {t}: holds"),
        Some(t) => format!("   target {t}: MISSED"),
        None => String::new(),
    };
    println!("        {name:42} {middle:>9.3} {unit:4} ({min:.3} .. {max:.3}){verdict}");
}

fn main() -> Result<(), Error> {
    let args = Cli::parse();
    let path = PathBuf::from(DATA).join("wikitext2/wiki.test.raw");
    let Ok(text) = std::fs::read_to_string(&path) else {
        println!("skipped: {} is missing", path.display());
        return Ok(());
    };
    let model = common::load_model(&args.model)?;
    let tokens = model.tokenize(&text, true, false)?;
    let bench = Bench { args: &args, model, tokens };
    // pages the weights in
    bench.session(Kind::Full, 64, FlashAttention::Off)?.prefill(bench.prompt(64), |_, _| ControlFlow::Continue(()))?;
    println!("{}, {} threads", bench.model.description(), args.threads);
    for &n in &args.prompt {
        let (for_prefill, for_decode) = bench.choose_flash(n)?;
        bench.prefill_and_vote(n, for_prefill)?;
        bench.decoding(n, for_decode)?;
    }
    Ok(())
}
