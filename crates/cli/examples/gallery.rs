//! Draws the pictures of the README, an easy and a hard request, from real votes.
//!
//! ```text
//! cargo run --release --example gallery -- MODEL.gguf OUT_FOLDER EASY_DOCUMENT QUESTION HARD_DOCUMENT QUESTION
//! ```

use std::error::Error;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use gvote::explain::Explanation;
use gvote::llama::{ContextParams, Model, ModelParams};
use gvote::{Session, SessionParams};
use gvote_chat::{ChatTemplate, Message, Role};
use plotters::coord::Shift;
use plotters::prelude::*;

type Result<T> = std::result::Result<T, Box<dyn Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Sizes in pixels.
const WIDTH: u32 = 900;
const MARGIN: i32 = 16;
const INK: RGBColor = RGBColor(0x1a, 0x1a, 0x1a);
const DIM: RGBColor = RGBColor(0x5c, 0x5c, 0x5c);
const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);
/// Colours of the easy and the hard request, from Okabe and Ito's palette.
const COLOURS: [RGBColor; 2] = [RGBColor(0x00, 0x72, 0xb2), RGBColor(0xd5, 0x5e, 0x00)];
const NAMES: [&str; 2] = ["easy", "hard"];

struct Request {
    question: String,
    vote: Explanation,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, out, easy, easy_question, hard, hard_question] = &args[..] else {
        return Err("usage: gallery MODEL.gguf OUT_FOLDER EASY_DOCUMENT QUESTION HARD_DOCUMENT QUESTION".into());
    };
    let model = Model::load(Path::new(model), &ModelParams::default(), |_| true)?;
    let requests = [explain(&model, easy, easy_question)?, explain(&model, hard, hard_question)?];
    fs::create_dir_all(out)?;
    for (name, draw) in [("trial", trial as fn(&Area, &[Request; 2]) -> _), ("layers", layers), ("text", text)] {
        let path = Path::new(out).join(name).with_extension("svg");
        let height = if name == "layers" { 560 } else { 400 };
        {
            let area = SVGBackend::new(&path, (WIDTH, height)).into_drawing_area();
            area.fill(&WHITE)?;
            draw(&area, &requests)?;
            area.present()?;
        }
        println!("{}: {} bytes", path.display(), fs::metadata(&path)?.len());
    }
    Ok(())
}

/// Reads the document and the question, and votes with the default policy.
fn explain(model: &Model, document: &str, question: &str) -> Result<Request> {
    let text = format!("{}\n\n{question}", fs::read_to_string(document)?.trim_end());
    let prompt = ChatTemplate::of(model).render(&[Message::new(Role::User, text)], true)?;
    let tokens = prompt.tokens(model)?;
    let context = ContextParams { n_ctx: tokens.len() as u32, ..Default::default() };
    let mut session = Session::new(model, &SessionParams { context, ..Default::default() })?;
    session.prefill(&tokens, |_, _| ControlFlow::Continue(()))?;
    let vote = session.explain()?;
    let report = &vote.report;
    println!("{question}: {} -> {} cells, {:?}", report.cells_before, report.cells_after, report.tried);
    Ok(Request { question: question.to_owned(), vote })
}

fn words(size: i32, colour: RGBColor) -> TextStyle<'static> {
    // plotters expects the height of a line, not of its letters
    ("sans-serif", size * 5 / 4).into_font().color(&colour)
}

/// Draws name, question and result of a request at the top of its half.
fn title(area: &Area, place: usize, request: &Request) -> Result<()> {
    let report = &request.vote.report;
    area.draw(&Text::new(
        format!("{}: “{}”", NAMES[place], request.question),
        (MARGIN, 14),
        words(14, COLOURS[place]),
    ))?;
    area.draw(&Text::new(
        format!("{} of {} cells kept: {:.0} %", report.cells_after, report.cells_before, 100.0 * report.share()),
        (MARGIN, 34),
        words(13, DIM),
    ))?;
    Ok(())
}

/// Draws the trials' measurements: one bar, two requests, two numbers of cells.
fn trial(area: &Area, requests: &[Request; 2]) -> Result<()> {
    let halves = area.split_evenly((1, 2));
    let bar = f64::from(requests[0].vote.bar.ok_or("the vote made no trial")?);
    let tried = |request: &Request| -> Vec<(f64, f64)> {
        let before = request.vote.report.cells_before as f64;
        let all = request.vote.report.tried.iter().map(|&(cells, kl)| (100.0 * cells as f64 / before, f64::from(kl)));
        all.collect()
    };
    let most = requests.iter().flat_map(tried).map(|(_, kl)| kl).fold(2.0 * bar, f64::max);
    for (place, (half, request)) in halves.iter().zip(requests).enumerate() {
        title(half, place, request)?;
        let mut chart = ChartBuilder::on(half)
            .margin(MARGIN)
            .margin_top(64)
            .x_label_area_size(44)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..100.0, (bar / 10.0..2.0 * most).log_scale())?;
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .axis_style(INK)
            .label_style(words(12, INK))
            .x_desc("cells tried, %")
            .y_desc("KL to the full cache, nats a token")
            .x_label_formatter(&|x| format!("{x:.0}"))
            .x_labels(6)
            .y_labels(5)
            .draw()?;
        chart.draw_series(DashedLineSeries::new([(0.0, bar), (100.0, bar)], 6, 4, DIM.stroke_width(2)))?;
        let chosen = 100.0 * request.vote.report.share();
        let kept = [(0.0, bar / 10.0), (chosen, 2.0 * most)];
        chart.draw_series([Rectangle::new(kept, COLOURS[place].mix(0.15).filled())])?;
        for (x, kl) in tried(request) {
            let at = (x, kl.max(bar / 10.0));
            let style = if kl <= bar { COLOURS[place].filled() } else { COLOURS[place].stroke_width(2) };
            chart.plotting_area().draw(&Circle::new(at, 6, style))?;
        }
    }
    Ok(())
}

/// Columns of the text, and the share of a layer's height that a column takes if all heads of the layer kept it.
const COLUMNS: usize = 120;
const FULL: f64 = 0.9;

/// Draws one strip per layer: the share of its heads that kept each part of the text.
fn layers(area: &Area, requests: &[Request; 2]) -> Result<()> {
    for (place, (half, request)) in area.split_evenly((1, 2)).iter().zip(requests).enumerate() {
        title(half, place, request)?;
        let vote = &request.vote;
        let (n, n_layer) = (vote.tokens.len(), vote.layers.len());
        let mut chart = ChartBuilder::on(half)
            .margin(MARGIN)
            .margin_top(64)
            .x_label_area_size(44)
            .y_label_area_size(44)
            .build_cartesian_2d(0.0..n as f64, n_layer as f64..0.0)?;
        chart
            .configure_mesh()
            .disable_mesh()
            .axis_style(INK)
            .label_style(words(12, INK))
            .x_desc("token of the prompt")
            .y_desc("layer")
            .y_labels(6)
            .y_label_formatter(&|y| format!("{y:.0}"))
            .x_label_formatter(&|x| format!("{x:.0}"))
            .x_labels(6)
            .draw()?;
        for layer in 0..n_layer {
            let mut kept = vec![0_u32; COLUMNS];
            for head in layer * vote.n_head_kv..(layer + 1) * vote.n_head_kv {
                vote.kept.row(head).for_each(|position| kept[position * COLUMNS / n] += 1);
            }
            let base = layer as f64 + 1.0;
            let whole = (n * vote.n_head_kv) as f64 / COLUMNS as f64;
            let ridge: Vec<(f64, f64)> = kept
                .iter()
                .enumerate()
                .map(|(column, &kept)| {
                    let x = (column as f64 + 0.5) * n as f64 / COLUMNS as f64;
                    (x, base - FULL * (f64::from(kept) / whole).min(1.0))
                })
                .collect();
            let outline = [&[(ridge[0].0, base)][..], &ridge, &[(ridge[COLUMNS - 1].0, base)]].concat();
            chart.draw_series([Polygon::new(outline, COLOURS[place].filled())])?;
        }
    }
    Ok(())
}

/// Letters per line of the excerpt, number of lines, and width of a letter in pixels.
const LETTERS: usize = 54;
const LINES: i32 = 14;
const LETTER: f64 = 7.2;
const LINE: i32 = 22;

/// Draws a passage of each text in which the vote was selective, shaded by how many heads kept each token.
fn text(area: &Area, requests: &[Request; 2]) -> Result<()> {
    for (place, (half, request)) in area.split_evenly((1, 2)).iter().zip(requests).enumerate() {
        title(half, place, request)?;
        let vote = &request.vote;
        let (start, heads) = (choosy(vote), vote.n_heads() as f64);
        let (mut line, mut column) = (0, 0);
        for (token, &kept_by) in vote.texts[start..].iter().zip(&vote.kept_by[start..]) {
            let shade = COLOURS[place].mix(0.75 * f64::from(kept_by) / heads);
            for part in token.split_inclusive('\n') {
                let mut shown = part.trim_end_matches('\n');
                if column + shown.chars().count() > LETTERS {
                    (line, column) = (line + 1, 0);
                    shown = shown.trim_start();
                }
                let letters = shown.chars().count();
                if line >= LINES {
                    break;
                }
                let (x, y) = (MARGIN + (column as f64 * LETTER) as i32, 64 + line * LINE);
                let end = MARGIN + ((column + letters) as f64 * LETTER) as i32;
                if letters > 0 {
                    half.draw(&Rectangle::new([(x, y), (end, y + LINE - 3)], shade.filled()))?;
                    words_of(shown).try_for_each(|(at, word)| {
                        let style = ("monospace", 15).into_font().color(&INK);
                        half.draw(&Text::new(word, (x + (at as f64 * LETTER) as i32, y + 2), style))
                    })?;
                }
                column += letters;
                // there is no room for empty lines
                if part.ends_with('\n') && column > 0 {
                    (line, column) = (line + 1, 0);
                }
            }
        }
    }
    Ok(())
}

/// Returns the words of a text with their offsets, since an image has no spaces.
fn words_of(text: &str) -> impl Iterator<Item = (usize, String)> {
    let mut words: Vec<(usize, String)> = Vec::new();
    let mut is_inside = false;
    for (at, c) in text.chars().enumerate() {
        if c == ' ' {
            is_inside = false;
        } else if is_inside {
            words.last_mut().expect("a word has begun").1.push(c);
        } else {
            words.push((at, c.to_string()));
            is_inside = true;
        }
    }
    words.into_iter()
}

/// Returns the start of the line from which the number of heads that keep a token varies most.
fn choosy(vote: &Explanation) -> usize {
    /// Number of tokens that the picture has room for.
    const SHOWN: usize = 160;
    let spread = |start: &usize| {
        let kept: Vec<f64> = vote.kept_by[*start..start + SHOWN].iter().map(|&kept_by| f64::from(kept_by)).collect();
        let mean = kept.iter().sum::<f64>() / SHOWN as f64;
        kept.iter().map(|kept| (kept - mean) * (kept - mean)).sum::<f64>()
    };
    let is_line = |start: &usize| vote.texts[start - 1].ends_with('\n');
    // the first and last tenth are the chat's markup, the title, and tokens kept because they are recent
    let n = vote.texts.len();
    let starts = (n / 10..(n - n / 10).saturating_sub(SHOWN)).filter(is_line);
    starts.max_by(|a, b| spread(a).total_cmp(&spread(b))).unwrap_or(0)
}
