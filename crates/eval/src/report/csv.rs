//! Writes every figure of a report, one in each line.

use std::io;

use serde::Serialize;

use super::{Measure, Place, Report, Spending};

/// One line. Shares and scores are 0 to 1, KL is in nats.
#[derive(Serialize)]
struct Line<'a> {
    section: &'static str,
    model: &'a str,
    cache_type: &'a str,
    suite: &'a str,
    blind: bool,
    config: &'a str,
    task_or_metric: &'a str,
    n: usize,
    share: f64,
    value: f64,
    spread: Option<f64>,
}

/// Common fields of all figures in one row.
struct Row<'a> {
    section: &'static str,
    place: &'a Place,
    suite: &'a str,
    config: &'a str,
}

/// One figure: records, mean share kept, value, spread.
type Figure = (usize, f64, f64, Option<f64>);

impl<'a> Row<'a> {
    fn line(&self, task_or_metric: &'a str, (n, share, value, spread): Figure) -> Line<'a> {
        Line {
            section: self.section,
            model: &self.place.model,
            cache_type: &self.place.cache_type,
            suite: self.suite,
            blind: self.place.blind,
            config: self.config,
            task_or_metric,
            n,
            share,
            value,
            spread,
        }
    }
}

pub fn write(report: &Report, to: impl io::Write) -> io::Result<()> {
    let mut out = csv::Writer::from_writer(to);
    fidelity(report, &mut out)?;
    tasks(report, &mut out)?;
    adaptivity(report, &mut out)?;
    ablation(report, &mut out)?;
    out.flush()
}

fn fidelity(report: &Report, out: &mut csv::Writer<impl io::Write>) -> csv::Result<()> {
    for table in &report.fidelity {
        let suite = super::table::tokens(table.tokens);
        for r in &table.rows {
            let row = Row { section: "fidelity", place: &table.place, suite: &suite, config: &r.config };
            let figures = [
                ("kl_mean", r.kl_mean, r.seed_spread),
                ("kl_median", r.kl_median, None),
                ("kl_p90", r.kl_p90, None),
                ("perplexity_ratio", r.perplexity_ratio, None),
                ("same_top", r.same_top, None),
            ];
            for (metric, value, spread) in figures {
                out.serialize(row.line(metric, (r.n, r.share, value, spread)))?;
            }
        }
    }
    Ok(())
}

fn tasks(report: &Report, out: &mut csv::Writer<impl io::Write>) -> csv::Result<()> {
    for table in &report.tasks {
        for r in &table.rows {
            let row = Row { section: "task", place: &table.place, suite: &table.suite, config: &r.config };
            for (task, score) in table.tasks.iter().zip(&r.scores) {
                if let Some(s) = score {
                    out.serialize(row.line(task, (s.n, s.share, s.mean, s.standard_error)))?;
                }
            }
            out.serialize(row.line("mean_over_tasks", (r.n, r.share, r.mean, r.standard_error)))?;
            if let Some(d) = &r.difference {
                out.serialize(row.line("difference_to_full", (d.n, d.share, d.mean, d.standard_error)))?;
            }
        }
    }
    Ok(())
}

fn adaptivity(report: &Report, out: &mut csv::Writer<impl io::Write>) -> csv::Result<()> {
    for table in &report.adaptivity {
        for r in &table.rows {
            let families = r.families.iter().map(|f| (f.family.as_str(), &f.spending));
            for (family, spending) in [("all", &r.spending)].into_iter().chain(families) {
                let suite = format!("{}/{family}", table.target);
                let row = Row { section: "adaptivity", place: &table.place, suite: &suite, config: &r.config };
                let Spending { n, share_median: share, .. } = *spending;
                let (same, few) = (&spending.fixed_same_misses, &spending.fixed_few_misses);
                let figures = [
                    ("overspend_median", spending.overspend_median),
                    ("overspend_q1", spending.overspend_q1),
                    ("overspend_q3", spending.overspend_q3),
                    ("misses", spending.misses),
                    ("fixed_ratio_same_misses", same.ratio),
                    ("fixed_overspend_same_misses", same.overspend_median),
                    ("fixed_ratio_few_misses", few.ratio),
                    ("fixed_overspend_few_misses", few.overspend_median),
                ];
                let correlation = spending.rank_correlation.map(|r| ("rank_correlation", r));
                for (metric, value) in figures.into_iter().chain(correlation) {
                    out.serialize(row.line(metric, (n, share, value, None)))?;
                }
            }
        }
    }
    Ok(())
}

fn ablation(report: &Report, out: &mut csv::Writer<impl io::Write>) -> csv::Result<()> {
    let Some(ablation) = &report.ablation else { return Ok(()) };
    for c in &ablation.comparisons {
        let what = match c.measure {
            Measure::Score => "score",
            Measure::Kl => "kl",
            Measure::Gap => "gap",
        };
        let metric = format!("{what}_difference_to_{}", ablation.baseline);
        for r in &c.rows {
            let d = &r.difference;
            let row = Row { section: "ablation", place: &c.place, suite: &c.suite, config: &r.config };
            out.serialize(row.line(&metric, (d.n, d.share, d.difference, d.standard_error)))?;
        }
    }
    Ok(())
}
