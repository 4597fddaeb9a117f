//! Endless generation in a fixed number of cells: `make soak`, or `cargo bench --bench soak -- --help`.
//!
//! Fails if memory grows or speed falls beyond the limits below. The text itself is not checked: beyond the model's training context it is
//! nonsense.

mod common;

use std::ops::ControlFlow;
use std::time::Instant;

use clap::Parser;
use common::{Error, median};
use gvote::llama::{ContextParams, LlamaError, Sampler, SamplerParams};
use gvote::session::Stop;
use gvote::{Session, SessionParams};

/// Maximum growth of resident memory after the first part, in bytes: the list of tokens takes 4 bytes per token and doubles when full, and
/// the allocator keeps some memory.
const GROWTH: f64 = 16e6;
/// Minimum speed of the last quarter, relative to the first quarter after the first part; speed varies on a machine with other work.
const STEADY: f64 = 0.85;
/// Minimum number of parts for a comparison: the cells fill up in the first one, and the others are divided into quarters.
const PARTS: usize = 5;

#[derive(Parser)]
#[command(about, bin_name = "soak")]
struct Cli {
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
    #[command(flatten)]
    model: common::ModelArgs,
    /// Tokens to generate
    #[arg(short, default_value_t = 100_000)]
    n: usize,
    /// Number of cells
    #[arg(short, default_value_t = 2048)]
    cells: u32,
    /// Tokens between two lines of output
    #[arg(short, long, default_value_t = 5000, value_parser = clap::value_parser!(i32).range(1..))]
    every: i32,
    #[arg(short, long, default_value_t = std::thread::available_parallelism().map_or(2, |n| n.get() as i32))]
    threads: i32,
}

/// Returns the resident bytes.
fn resident() -> Result<f64, Error> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS")).ok_or("/proc/self/status has no VmRSS")?;
    let kilobytes: f64 = line.split_whitespace().nth(1).ok_or("VmRSS has no value")?.parse()?;
    Ok(1024.0 * kilobytes)
}

fn main() -> Result<(), Error> {
    let args = Cli::parse_from(common::arguments());
    let parts = args.n / args.every as usize;
    if parts < PARTS {
        return Err(format!("{PARTS} parts are the least: raise -n or lower --every").into());
    }
    let model = args.model.load()?;
    let context = ContextParams {
        n_ctx: args.cells,
        n_threads: args.threads,
        n_threads_batch: args.threads,
        ..ContextParams::default()
    };
    let mut session = Session::new(&model, &SessionParams { context, ..SessionParams::default() })?;
    let mut sampler = Sampler::new(&model, &SamplerParams { seed: 1, ..SamplerParams::default() }, 0)?;
    // the model may end its text at any time; then another one begins
    let read = |text: &str, add_special: bool| match model.tokenize(text, add_special, false) {
        Err(LlamaError::Tokenize) => Ok(common::random_tokens(&model, text.len())),
        tokens => tokens,
    };
    let start = read("Once upon a time", true)?;
    let again = read("\n\nOnce upon a time", false)?;
    session.prefill(&start, |_, _| ControlFlow::Continue(()))?;

    println!("{}, {} cells, {} threads", model.description(), args.cells, args.threads);
    println!("| tokens | tokens/s | freed | cells | RSS, MB |");
    println!("| -----: | -------: | ----: | ----: | ------: |");
    let (mut speeds, mut resident_at) = (Vec::new(), Vec::new());
    for part in 1..=parts {
        let clock = Instant::now();
        let (mut left, mut freed) = (args.every, 0);
        while left > 0 {
            let report = session.generate(&mut sampler, left, |_| ControlFlow::Continue(()))?;
            left -= report.tokens as i32;
            freed += report.squeezes.count;
            match report.stop {
                Stop::Limit => {}
                Stop::EndOfGeneration => {
                    freed += session.prefill_long(&again, |_, _| ControlFlow::Continue(()))?.squeezes.count;
                }
                stop => return Err(format!("it ended: {stop:?}").into()),
            }
        }
        speeds.push(f64::from(args.every) / clock.elapsed().as_secs_f64());
        resident_at.push(resident()?);
        println!(
            "| {} | {:.1} | {freed} | {} | {:.1} |",
            part * args.every as usize,
            speeds[part - 1],
            session.cells_used(),
            resident_at[part - 1] / 1e6
        );
        if session.cells_used() > args.cells as usize {
            return Err("more cells than there may be".into());
        }
    }
    let quarter = (parts - 1) / 4;
    let (first, last) = (median(&speeds[1..=quarter]), median(&speeds[parts - quarter..]));
    let grown = resident_at[parts - 1] - resident_at[0];
    println!("speed of the last quarter / the first: {:.2}, memory grown by {:.1} MB", last / first, grown / 1e6);
    if grown > GROWTH {
        return Err(format!("memory grew by {:.1} MB, and {:.0} are allowed", grown / 1e6, GROWTH / 1e6).into());
    }
    if last < STEADY * first {
        return Err(format!("the last quarter is slower: {last:.1} tokens/s after {first:.1}").into());
    }
    Ok(())
}
