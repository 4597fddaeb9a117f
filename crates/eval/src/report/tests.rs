//! Figures worked out by hand, and self-contained pages.

use super::*;
use crate::{Adaptivity, Fidelity, TaskScore};

fn run(config: &str, seed: u64, item: &str, cells: usize) -> Run {
    let policy = if config == FULL { Kind::Full } else { Kind::Gvote };
    let (model, cache_type) = ("m.gguf".into(), "f16".into());
    let (exact, ragged) = (false, None);
    let (config, item) = (config.into(), item.into());
    Run { model, cache_type, config, policy, seed, item, tokens: 1000, cells, exact, ragged, blind: false }
}

fn fidelity(config: &str, seed: u64, cells: usize, kl: f64, log_ratio: f64) -> Record {
    Record::Fidelity(Fidelity {
        run: run(config, seed, "a", cells),
        steps: 64,
        kl_mean: kl,
        kl_median: kl / 2.0,
        kl_p90: kl * 3.0,
        log_perplexity_ratio: log_ratio,
        same_top: 1.0 - kl,
    })
}

fn task(config: &str, task: &str, item: &str, score: f64) -> Record {
    let cells = if config == FULL { 1000 } else { 250 };
    let run = run(config, 1, item, cells);
    let (suite, answer) = ("suite".into(), String::new());
    Record::Task(TaskScore { run, suite, task: task.into(), score, answer, depth: None })
}

fn needle(config: &str, length: &str, depth: f64, score: f64) -> Record {
    let Record::Task(plain) = task(config, length, "n", score) else { unreachable!() };
    Record::Task(TaskScore { suite: "needle".into(), depth: Some(depth), ..plain })
}

fn adaptivity(config: &str, family: &str, cells: usize, oracle_cells: usize, kl_mean: f64) -> Record {
    let run = run(config, 1, family, cells);
    Record::Adaptivity(Adaptivity {
        run,
        family: family.into(),
        steps: 64,
        target: 0.01,
        kl_mean,
        log_perplexity_ratio: 0.0,
        oracle_cells,
        ranking: "gvote".into(),
        curve: vec![(oracle_cells, 0.01), (1000, 0.0)],
        tried: vec![],
    })
}

/// Records of every kind.
fn everything() -> Vec<Record> {
    vec![
        fidelity("vote", 1, 250, 0.1, 0.1),
        fidelity("vote", 2, 250, 0.3, 0.3),
        task("vote", "qa", "1", 0.5),
        task("full", "qa", "1", 1.0),
        needle("vote", "4096", 0.5, 0.25),
        adaptivity("vote", "code", 300, 200, 0.001),
    ]
}

#[track_caller]
fn close(actual: f64, expected: f64) {
    assert!((actual - expected).abs() < 1e-12, "{actual} is not {expected}");
}

fn csv_of(report: &Report) -> String {
    let mut out = Vec::new();
    report.write_csv(&mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn fidelity_is_averaged_over_records() {
    let records = [
        fidelity("vote", 1, 100, 0.1, 0.2),
        fidelity("vote", 1, 300, 0.3, 0.4),
        fidelity("vote", 2, 200, 0.5, 0.6),
        fidelity("other", 1, 900, 9.0, 9.0),
    ];
    let report = Report::new(&records);
    assert_eq!(report.fidelity.len(), 1);
    assert_eq!(report.fidelity[0].tokens, 1024);
    let [row, other] = report.fidelity[0].rows.as_slice() else { panic!("two configurations") };
    assert_eq!((row.config.as_str(), row.n, other.n), ("vote", 3, 1));
    close(row.share, 0.2);
    close(row.kl_mean, 0.3);
    close(row.kl_median, 0.15);
    close(row.kl_p90, 0.9);
    close(row.same_top, 0.7);
    close(row.perplexity_ratio, 0.4_f64.exp());
    // The seeds' means are 0.2 and 0.5.
    close(row.seed_spread.unwrap(), 0.3 / 2_f64.sqrt());
    assert_eq!(other.seed_spread, None);
}

#[test]
fn what_differs_in_place_or_length_is_kept_apart() {
    let base = fidelity("vote", 1, 100, 0.1, 0.1);
    let with = |change: fn(&mut Run)| {
        let Record::Fidelity(mut r) = base.clone() else { unreachable!() };
        change(&mut r.run);
        Record::Fidelity(r)
    };
    let records = [
        base.clone(),
        with(|r| r.tokens = 1400),
        with(|r| r.tokens = 1500),
        with(|r| r.blind = true),
        with(|r| r.cache_type = "q8_0".into()),
        with(|r| r.model = "n.gguf".into()),
    ];
    let tables = Report::new(&records).fidelity;
    let found: Vec<_> = tables.iter().map(|t| (t.place.model.as_str(), t.place.blind, t.tokens, t.rows[0].n)).collect();
    let m = "m.gguf";
    assert_eq!(
        found,
        [(m, false, 1024, 2), (m, false, 2048, 1), (m, true, 1024, 1), (m, false, 1024, 1), ("n.gguf", false, 1024, 1)]
    );
}

#[test]
fn tasks_count_the_same_and_samples_make_the_error() {
    let records = [
        task("vote", "b", "1", 1.0),
        task("vote", "b", "2", 0.0),
        task("vote", "b", "3", 0.5),
        task("vote", "a", "1", 0.9),
        task("full", "b", "2", 0.25),
        task("full", "b", "3", 1.0),
        task("full", "b", "4", 1.0),
        task("full", "a", "2", 1.0),
    ];
    let report = Report::new(&records);
    let table = &report.tasks[0];
    assert_eq!(table.tasks, ["a", "b"]);
    let [full, vote] = table.rows.as_slice() else { panic!("two configurations") };
    assert_eq!((full.config.as_str(), vote.config.as_str()), ("full", "vote"));
    assert_eq!((vote.n, vote.share), (4, 0.25));
    close(vote.mean, (0.9 + 0.5) / 2.0);
    let b = vote.scores[1].unwrap();
    close(b.mean, 0.5);
    close(b.standard_error.unwrap(), (0.5 / 2.0_f64).sqrt() / 3_f64.sqrt());
    assert_eq!(vote.scores[0].unwrap().standard_error, None);
    // Scores 1, 0, 0.5 and 0.9 have the mean 0.6.
    let squares = 0.16 + 0.36 + 0.01 + 0.09;
    close(vote.standard_error.unwrap(), (squares / 3.0_f64).sqrt() / 2.0);
    // Both have items 2 and 3 of task b: 0 - 0.25 and 0.5 - 1.
    let difference = vote.difference.unwrap();
    assert_eq!(difference.n, 2);
    close(difference.mean, -0.375);
    close(difference.standard_error.unwrap(), 0.125);
    assert_eq!(full.difference, None);
}

#[test]
fn seeds_of_an_item_are_one_sample() {
    let Record::Task(first) = task("vote", "a", "1", 1.0) else { unreachable!() };
    let second = TaskScore { run: Run { seed: 2, ..first.run.clone() }, score: 0.0, ..first.clone() };
    let records = [Record::Task(first), Record::Task(second), task("vote", "a", "2", 1.0), task("full", "a", "1", 1.0)];
    let report = Report::new(&records);
    let row = &report.tasks[0].rows[1];
    assert_eq!(row.n, 2);
    close(row.mean, 0.75);
    close(row.difference.unwrap().mean, -0.5);
    assert_eq!(row.difference.unwrap().n, 1);
}

#[test]
fn lengths_are_in_the_order_of_their_numbers() {
    let records =
        [needle("vote", "16384", 0.5, 0.5), needle("vote", "4096", 1.0, 0.25), needle("vote", "4096", 0.0, 1.0)];
    let report = Report::new(&records);
    let needle = report.tasks[0].needle.as_ref().unwrap();
    assert_eq!(needle.lengths, ["4096", "16384"]);
    assert_eq!(needle.depths, [0, 50, 100]);
    assert_eq!(needle.maps[0].scores, [[Some(1.0), None], [None, Some(0.5)], [Some(0.25), None]]);
}

#[test]
fn names_with_numbers_are_in_the_order_of_the_numbers() {
    let mut names = ["1000 words", "ruler/16384", "500 words", "ruler/4096", "a 2 b 10", "a 2 b 9", ""];
    names.sort_by_key(|name| stats::natural(name));
    assert_eq!(names, ["", "500 words", "1000 words", "a 2 b 9", "a 2 b 10", "ruler/4096", "ruler/16384"]);
}

#[test]
fn a_map_needs_a_grid() {
    let at = |n: usize| (0..n).map(|i| needle("vote", "4096", i as f64 / n as f64, 1.0)).collect::<Vec<_>>();
    let has_map = |n: usize| Report::new(&at(n)).tasks[0].needle.is_some();
    assert_eq!([has_map(11), has_map(12)], [true, false]);
}

#[test]
fn overspending_is_told_in_quartiles() {
    // C/C* are 1, 1.5, 2 and 4; the second misses its target, the first reaches it exactly.
    let records = [
        adaptivity("vote", "code", 400, 100, 0.001),
        adaptivity("vote", "code", 100, 100, 0.01),
        adaptivity("vote", "story", 150, 100, 0.02),
        adaptivity("vote", "story", 200, 100, 0.001),
    ];
    let report = Report::new(&records);
    assert_eq!(report.adaptivity[0].target, 0.01);
    let row = &report.adaptivity[0].rows[0];
    let all = row.spending;
    assert_eq!((all.n, all.misses), (4, 0.25));
    close(all.overspend_median, 1.75);
    close(all.overspend_q1, 1.375);
    close(all.overspend_q3, 2.5);
    close(all.share_median, 0.175);
    let families: Vec<_> =
        row.families.iter().map(|f| (f.family.as_str(), f.spending.overspend_median, f.spending.misses)).collect();
    assert_eq!(families, [("code", 2.5, 0.0), ("story", 1.75, 0.5)]);
}

#[test]
fn the_best_fixed_ratio_is_known_in_hindsight() {
    // Of 1,000 cells each; shares needed: 10, 20, 30, 40 and 80 %. The policy misses the last.
    let choices = [(200, 100, 0.0), (150, 200, 0.005), (450, 300, 0.0), (500, 400, 0.0), (600, 800, 0.02)];
    let records: Vec<_> =
        choices.iter().map(|(cells, oracle, kl)| adaptivity("vote", "code", *cells, *oracle, *kl)).collect();
    let report = Report::new(&records);
    let all = report.adaptivity[0].rows[0].spending;
    // One miss is allowed: 40 % fails the last only; 0.4 over 0.1, 0.2, 0.3, 0.4 and 0.8 has the median 4/3.
    for fixed in [all.fixed_same_misses, all.fixed_few_misses] {
        assert_eq!((fixed.ratio, fixed.misses), (0.4, 0.2));
        close(fixed.overspend_median, 4.0 / 3.0);
    }
    // Ranks of the cells kept: 2, 1, 3, 4, 5; 1 - 6 (1 + 1) / (5 * 24).
    close(all.rank_correlation.unwrap(), 0.9);

    // Without a miss, as much as the most demanding request needs; with only misses, as little as the least demanding
    // one.
    let of = |kl: f64| {
        let records: Vec<_> =
            choices.iter().map(|(cells, oracle, _)| adaptivity("vote", "code", *cells, *oracle, kl)).collect();
        Report::new(&records).adaptivity[0].rows[0].spending
    };
    assert_eq!((of(0.0).fixed_same_misses.ratio, of(0.0).fixed_same_misses.misses), (0.8, 0.0));
    assert_eq!((of(1.0).fixed_same_misses.ratio, of(1.0).fixed_same_misses.misses), (0.1, 0.8));
}

#[test]
fn equal_values_share_a_rank_and_a_constant_has_none() {
    let correlation = stats::rank_correlation;
    close(correlation(&[1.0, 2.0, 3.0], &[30.0, 20.0, 10.0]).unwrap(), -1.0);
    // Ranks 1.5, 1.5, 3 and 1, 2, 3: 1.5 / sqrt(1.5 * 2).
    close(correlation(&[5.0, 5.0, 9.0], &[1.0, 2.0, 3.0]).unwrap(), 1.5 / 3_f64.sqrt());
    assert_eq!(correlation(&[5.0, 5.0], &[1.0, 2.0]), None);
    assert_eq!(correlation(&[5.0], &[1.0]), None);
}

#[test]
fn csv_has_a_line_a_figure() {
    let report = Report::new(&everything());
    let text = csv_of(&report);
    let mut lines = text.lines();
    let head = "section,model,cache_type,suite,blind,config,task_or_metric,n,share,value,spread";
    assert_eq!(lines.next().unwrap(), head);
    assert!(text.contains("fidelity,m.gguf,f16,1k,false,vote,kl_median,2,0.25,0.1,\n"), "{text}");
    assert!(text.contains("\ntask,m.gguf,f16,suite,false,vote,qa,1,0.25,0.5,\n"), "{text}");
    assert!(text.contains("\ntask,m.gguf,f16,suite,false,vote,difference_to_full,1,0.25,-0.5,\n"), "{text}");
    assert!(text.contains("\nadaptivity,m.gguf,f16,0.01/code,false,vote,overspend_median,1,0.3,1.5,\n"), "{text}");
    // 5 of fidelity; suite: task and mean for both, one difference; needle: task and mean; adaptivity: 8 for all and code.
    assert_eq!(lines.count(), 5 + 5 + 2 + 16);
}

#[test]
fn a_section_without_records_is_left_out() {
    let of = |keep: fn(&Record) -> bool| {
        let report = Report::new(&everything().into_iter().filter(keep).collect::<Vec<_>>());
        let json: serde_json::Value = serde_json::from_str(&report.to_json()).unwrap();
        let (html, text, csv) = (report.to_html(), report.to_text(), csv_of(&report));
        ["Fidelity", "Tasks", "Adaptivity"].map(|title| {
            let name = title.to_lowercase();
            let line = format!("\n{},", name.trim_end_matches('s'));
            let seen = [
                html.contains(&format!("<h2>{title}</h2>")),
                text.contains(&title.to_uppercase()),
                json.get(&name).is_some(),
                csv.contains(&line),
            ];
            assert!(seen.iter().all(|s| *s == seen[0]), "{title}: {seen:?}");
            seen[0]
        })
    };
    assert_eq!(of(|_| true), [true; 3]);
    assert_eq!(of(|r| matches!(r, Record::Fidelity(_))), [true, false, false]);
    assert_eq!(of(|r| matches!(r, Record::Task(_))), [false, true, false]);
    assert_eq!(of(|r| matches!(r, Record::Adaptivity(_))), [false, false, true]);
    assert_eq!(of(|_| false), [false; 3]);
}

#[test]
fn the_page_stands_alone() {
    let page = Report::new(&everything()).to_html();
    let svgs = page.matches("<svg").count();
    assert_eq!(page.matches("</svg>").count(), svgs);
    assert_eq!(page.matches("http://www.w3.org/2000/svg").count(), svgs);
    let rest = page.replace("http://www.w3.org/2000/svg", "");
    for outside in ["http:", "https:", "src=", "href=", "<script", "@import", "url("] {
        assert!(!rest.contains(outside), "{outside}");
    }
    // One of fidelity, two of the suite, three of the needle, one of adaptivity.
    assert_eq!(page.matches("class=\"panel\"").count(), 7);
    assert!(!page.contains("NaN") && !page.contains("inf\""));
}

#[test]
fn names_are_text() {
    let mut records = everything();
    for record in &mut records {
        let run = match record {
            Record::Start(_) => continue,
            Record::Fidelity(r) => &mut r.run,
            Record::Task(r) => {
                r.suite = "<b>suite".into();
                r.task = "<b>task".into();
                &mut r.run
            }
            Record::Adaptivity(r) => {
                r.family = "<b>family".into();
                &mut r.run
            }
        };
        run.model = "<b>model & \"sons\"".into();
        run.config = "<b>config".into();
    }
    let report = Report::new(&records);
    let page = report.to_html();
    assert!(!page.contains("<b>"));
    for name in ["suite", "task", "family", "model", "config"] {
        assert!(page.contains(&format!("&lt;b&gt;{name}")), "{name}");
    }
    assert!(report.to_text().contains("<b>model & \"sons\""));
}

#[test]
fn a_configuration_has_one_colour_everywhere() {
    let report = Report::new(&[everything(), vec![task("later", "qa", "1", 0.5)]].concat());
    let palette = plot::Palette(&report.configs);
    let [fidelity, tasks] =
        [plot::pareto::fidelity(&report.fidelity[0], palette), plot::pareto::tasks(&report.tasks[1], palette)];
    let first = "#0072B2";
    assert!(fidelity.svg.contains(first) && tasks.svg.contains(first));
    assert_eq!(palette.keys(["vote"].into_iter())[0], palette.keys(["later", "vote"].into_iter())[0]);
    assert!(!palette.keys(["later"].into_iter())[0].svg.contains(first));
}

#[test]
fn twelve_configurations_look_different_as_points_and_as_bars() {
    let names: Vec<String> = (0..12).map(|i| format!("c{i}")).collect();
    let report = Report::new(&names.iter().map(|name| task(name, "qa", "1", 0.5)).collect::<Vec<_>>());
    let palette = plot::Palette(&report.configs);
    let shown = || names.iter().map(String::as_str);
    for keys in [palette.keys(shown()), plot::bars::keys(shown(), palette)] {
        assert_eq!(keys.len(), 12);
        assert!((0..12).all(|i| (0..i).all(|j| keys[i].svg != keys[j].svg)));
    }
}

#[test]
fn a_wide_table_goes_on_below() {
    let names: Vec<String> = (1..=30).map(|i| format!("task_{i}")).collect();
    let records: Vec<Record> = names.iter().map(|name| task("vote", name, "1", 0.5)).collect();
    let text = Report::new(&records).to_text();
    assert!(text.lines().all(|line| line.chars().count() <= 120), "{text}");
    assert!(names.iter().all(|name| text.contains(name.as_str())));
    assert!(text.lines().filter(|line| line.starts_with("vote")).count() > 1);
}

#[test]
fn numbers_have_three_digits() {
    let written = [0.0, 0.000_000_42, 0.00123, 0.0456, 1.234, 12.34, 1234.0].map(table::figures);
    assert_eq!(written, ["0", "4.2e-7", "0.00123", "0.0456", "1.23", "12.3", "1234"]);
    assert_eq!([512, 1024, 8192, 131_072].map(table::tokens), ["512", "1k", "8k", "128k"]);
}

#[test]
fn the_full_cache_is_a_dashed_line_unless_the_axis_cannot_show_it() {
    let plot = |drifts: &[f64]| {
        let records: Vec<_> = drifts.iter().map(|kl| fidelity(&format!("at {kl}"), 1, 250, *kl, 0.0)).collect();
        let report = Report::new(&records);
        plot::pareto::fidelity(&report.fidelity[0], plot::Palette(&report.configs)).svg
    };
    let dashes = |svg: &str| svg.matches("stroke=\"#808080\" stroke-width=\"2\"").count();
    assert!(dashes(&plot(&[0.1, 0.2])) > 10);
    assert!(dashes(&plot(&[0.0])) > 10);
    let logarithmic = plot(&[0.0, 0.001, 0.2]);
    assert_eq!(dashes(&logarithmic), 0);
    assert_eq!(logarithmic.matches("<circle").count(), 3);
}
