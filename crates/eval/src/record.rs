//! Records of measurements, one line of a JSONL file each.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};

use super::provenance::Start;
use crate::text;
use gvote::policy::{Kind, Ragged};

/// One line of a run file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Record {
    /// Provenance of the following records. Files of earlier versions have none.
    Start(Start),
    /// A teacher-forced continuation after a compressed prompt.
    Fidelity(Fidelity),
    /// One answer to one task.
    Task(TaskScore),
    /// An automatic budget compared with the fewest cells that reach the target.
    Adaptivity(Adaptivity),
}

/// Fields of every record: the request, and how its cache was compressed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// File name of the model.
    pub model: String,
    /// Type of the K and V cache.
    pub cache_type: String,
    /// Name of the configuration, by which reports compare.
    pub config: String,
    pub policy: Kind,
    /// Seed of the synthetic queries.
    pub seed: u64,
    /// Name of the request, unique within its family.
    pub item: String,
    /// Number of tokens in the cache when it was compressed.
    pub tokens: usize,
    /// Number of cells kept of them; if `exact`, the mean over the heads.
    pub cells: usize,
    /// The heads keep different numbers behind a mask ([`gvote::policy::Params::exact`]): no cache can hold so few
    /// cells.
    #[serde(default, skip_serializing_if = "is_false")]
    pub exact: bool,
    /// Numbers that the heads would keep if each could hold its own, if the policy computes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ragged: Option<Ragged>,
    /// The context was compressed before the question was known.
    pub blind: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

impl Run {
    /// Returns the name of the configuration in reports, marked if no cache can hold its cells.
    pub fn label(&self) -> String {
        if self.exact { format!("{} (exact)", self.config) } else { self.config.clone() }
    }

    /// Share of the cells kept, 0 to 1.
    pub fn share(&self) -> f64 {
        self.cells as f64 / self.tokens.max(1) as f64
    }
}

/// Distance of the next-token distributions from those of the full cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fidelity {
    #[serde(flatten)]
    pub run: Run,
    /// Number of steps of the continuation.
    pub steps: usize,
    /// KL(full || compressed) in nats over the steps.
    pub kl_mean: f64,
    pub kl_median: f64,
    pub kl_p90: f64,
    /// Mean over the steps of ln p_full(next) - ln p_compressed(next): the logarithm of the perplexity ratio.
    pub log_perplexity_ratio: f64,
    /// Share of the steps with the same most likely token.
    pub same_top: f64,
}

/// Score of one answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskScore {
    #[serde(flatten)]
    pub run: Run,
    /// Name of the suite, such as `ruler/4096`, `gsm8k`, `longbench`, `needle`.
    pub suite: String,
    /// Name of the task, such as `niah_single_1`.
    pub task: String,
    /// 0 to 1.
    pub score: f64,
    pub answer: String,
    /// Position of the needle in the context, 0 (start) to 1 (end), if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<f64>,
}

/// Cells spent by an automatic or fixed choice of C, compared with the fewest that reach the target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Adaptivity {
    #[serde(flatten)]
    pub run: Run,
    /// Kind of request: narrative, code, few-shot, needle, summary.
    pub family: String,
    /// Number of steps of the continuation.
    #[serde(default)]
    pub steps: usize,
    /// Target for the mean KL.
    pub target: f64,
    /// Mean KL at the chosen cells.
    pub kl_mean: f64,
    pub log_perplexity_ratio: f64,
    /// C*: the fewest cells, with the same ranking, whose mean KL is at most the target: see [`super::search::fewest`].
    pub oracle_cells: usize,
    /// Name of the ranking: configurations that share it differ only in their budget.
    #[serde(default)]
    pub ranking: String,
    /// Measurements of the search for C*: cells, fewest first, and their mean KL.
    #[serde(default)]
    pub curve: Vec<(usize, f32)>,
    /// Measurements of the policy's own trial: cells, in the order of the attempts, and the mean KL along its draft.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tried: Vec<(usize, f32)>,
}

impl Adaptivity {
    /// C / C*.
    pub fn overspend(&self) -> f64 {
        self.run.cells as f64 / self.oracle_cells.max(1) as f64
    }

    /// Share of the cells needed, C*/n, 0 to 1.
    pub fn oracle_share(&self) -> f64 {
        self.oracle_cells as f64 / self.run.tokens.max(1) as f64
    }

    /// Returns true if the chosen cells failed the target.
    pub fn missed(&self) -> bool {
        self.kl_mean > self.target
    }
}

impl Record {
    /// Returns the request of a measurement.
    pub fn run(&self) -> Option<&Run> {
        match self {
            Self::Start(_) => None,
            Self::Fidelity(r) => Some(&r.run),
            Self::Task(r) => Some(&r.run),
            Self::Adaptivity(r) => Some(&r.run),
        }
    }
}

/// Why a file of records cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
    #[error("{path}:{line}: {error}")]
    Line { path: PathBuf, line: usize, error: serde_json::Error },
    #[error("{path}: the configuration {config} had other settings there; give it another name, or use another file")]
    Settings { path: PathBuf, config: String },
}

/// Contents of a file of records.
#[derive(Debug, Default, PartialEq)]
pub struct Contents {
    pub records: Vec<Record>,
    /// The last line was incomplete, as after a killed run, and was left out.
    pub cut_off: bool,
}

/// Reads the records of a JSONL file, in order; skips empty lines.
///
/// # Errors
/// [`RecordError`] with the path, and with the line of the first invalid record.
pub fn read(path: &Path) -> Result<Contents, RecordError> {
    let at = |error| RecordError::Io(path.to_owned(), error);
    let mut reader = BufReader::new(File::open(path).map_err(at)?);
    let mut contents = Contents::default();
    let mut text = Vec::new();
    for line in 1.. {
        text.clear();
        if reader.read_until(b'\n', &mut text).map_err(at)? == 0 {
            break;
        }
        if text.last() != Some(&b'\n') {
            contents.cut_off = true;
            break;
        }
        let text = if line == 1 { text::bytes_without_mark(&text) } else { &text };
        if text.trim_ascii().is_empty() {
            continue;
        }
        let record =
            serde_json::from_slice::<Value>(text).and_then(|value| serde_json::from_value(plain_floats(value)));
        contents.records.push(record.map_err(|error| RecordError::Line { path: path.to_owned(), line, error })?);
    }
    Ok(contents)
}

/// Rewrites every float in serde_json's spelling.
///
/// gguf-rs enables serde_json's arbitrary_precision. With it a tagged enum can read floats only through a `Value`, and
/// only in serde_json's own spelling, but other tools write 1e-5.
fn plain_floats(value: Value) -> Value {
    match value {
        Value::Number(number) if !number.is_i64() && !number.is_u64() => {
            number.as_f64().and_then(Number::from_f64).map_or(Value::Number(number), Value::Number)
        }
        Value::Array(values) => values.into_iter().map(plain_floats).collect(),
        Value::Object(fields) => fields.into_iter().map(|(name, value)| (name, plain_floats(value))).collect(),
        other => other,
    }
}

/// An append-only file of records, with its earlier contents, so that a killed run can continue.
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Written before the first record, so that a run with nothing left to do writes nothing.
    start: Option<Start>,
    pub records: Vec<Record>,
    /// An incomplete last line was cut off.
    pub cut_off: bool,
}

impl Journal {
    /// Opens or creates a file and cuts off an incomplete last line.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn open(path: &Path) -> Result<Self, RecordError> {
        let at = |error| RecordError::Io(path.to_owned(), error);
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(at)?;
        let Contents { records, cut_off } = read(path)?;
        if cut_off {
            let whole = std::fs::read(path).map_err(at)?;
            let complete = whole.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
            file.set_len(complete as u64).map_err(at)?;
        }
        Ok(Self { path: path.to_owned(), file, start: None, records, cut_off })
    }

    /// Sets the start to write before the next record, unless the file already has it.
    ///
    /// # Errors
    /// [`RecordError::Settings`] if a configuration of the same name had other settings, because their records would be
    /// mixed.
    pub fn begin(&mut self, start: Start) -> Result<(), RecordError> {
        let mut starts = self.records.iter().filter_map(|record| match record {
            Record::Start(start) => Some(start),
            _ => None,
        });
        if let Some(config) = starts.clone().find_map(|known| start.contradiction(known)) {
            return Err(RecordError::Settings { path: self.path.clone(), config: config.into() });
        }
        self.start = (!starts.any(|known| *known == start)).then_some(start);
        Ok(())
    }

    /// Appends a record and passes it to the operating system before returning.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn add(&mut self, record: Record) -> Result<(), RecordError> {
        if let Some(start) = self.start.take() {
            self.write(Record::Start(start))?;
        }
        self.write(record)
    }

    fn write(&mut self, record: Record) -> Result<(), RecordError> {
        let mut line = serde_json::to_vec(&record).expect("records have string keys only");
        line.push(b'\n');
        self.file.write_all(&line).map_err(|error| RecordError::Io(self.path.clone(), error))?;
        self.records.push(record);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gvote::llama::ContextParams;

    #[test]
    fn floats_are_read_however_they_are_spelled() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let line = serde_json::to_string(&record()).unwrap();
        let spelled = line.replace("0.000000125", "1.25E-7").replace("1.25e-7", "1.25E-7");
        assert_ne!(line, spelled, "{line}");
        std::fs::write(file.path(), spelled + "\n").unwrap();
        assert_eq!(read(file.path()).unwrap().records, [record()]);
    }

    fn record() -> Record {
        let run = Run {
            model: "m.gguf".into(),
            cache_type: "f16/f16".into(),
            config: "half".into(),
            policy: Kind::SnapKv,
            seed: 3,
            item: "text 0".into(),
            tokens: 100,
            cells: 50,
            exact: true,
            ragged: Some(Ragged { min: 10, mean: 49.7, max: 90 }),
            blind: false,
        };
        Record::Fidelity(Fidelity {
            run,
            steps: 7,
            kl_mean: 1.25e-7,
            kl_median: 0.1,
            kl_p90: 1.0 / 3.0,
            log_perplexity_ratio: -0.5,
            same_top: 1.0,
        })
    }

    fn start(config: &str) -> Start {
        let configs = [config.parse().unwrap()];
        Start::now(["gvote".into()], Path::new("m.gguf"), &ContextParams::default(), &configs, &[0])
    }

    #[test]
    fn a_journal_goes_on_after_a_half_written_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs.jsonl");
        Journal::open(&path).unwrap().add(record()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        assert!(!read(&path).unwrap().cut_off);
        // a line can be cut in the middle of a character
        std::fs::write(&path, [&whole[..], &whole[..30], b"\xc3"].concat()).unwrap();
        assert_eq!(read(&path).unwrap(), Contents { records: vec![record()], cut_off: true });
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!((&journal.records[..], journal.cut_off), (&[record()][..], true));
        journal.add(record()).unwrap();
        assert_eq!(read(&path).unwrap(), Contents { records: vec![record(), record()], cut_off: false });
    }

    #[test]
    fn a_start_is_written_once_and_not_without_a_measurement() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs.jsonl");
        let begin = |config: &str| {
            let mut journal = Journal::open(&path).unwrap();
            journal.begin(start(config)).map(|()| journal)
        };
        begin("half:ratio=0.5").unwrap();
        assert_eq!(read(&path).unwrap().records, []);
        begin("half:ratio=0.5").unwrap().add(record()).unwrap();
        begin("half:ratio=0.5").unwrap().add(record()).unwrap();
        begin("safe").unwrap().add(record()).unwrap();
        let starts = [start("half:ratio=0.5"), start("safe")].map(Record::Start);
        let [half, safe] = starts;
        assert_eq!(read(&path).unwrap().records, [half, record(), record(), safe, record()]);
        let error = begin("half:ratio=0.4").err().unwrap().to_string();
        assert!(error.contains("runs.jsonl: the configuration half"), "{error}");
    }

    #[test]
    fn a_malformed_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs.jsonl");
        let good = serde_json::to_string(&record()).unwrap();
        for wrong in ["{\"kind\":\"task\"}", "{\"kind\":\"other\"}", "[]", "\u{fffd}", &good[..40]] {
            std::fs::write(&path, format!("{good}\n\n{wrong}\n{good}\n")).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("runs.jsonl:3:"), "{error}");
        }
    }

    #[test]
    fn a_file_of_an_earlier_version_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs.jsonl");
        let run =
            r#""model":"m.gguf","cache_type":"f16/f16","config":"half","policy":"snapkv","seed":3,"item":"text 0""#;
        let cells = r#""tokens":100,"cells":50,"blind":false"#;
        let task =
            format!(r#"{{"kind":"task",{run},{cells},"suite":"gsm8k","task":"gsm8k","score":1.0,"answer":"18"}}"#);
        let spent = r#""family":"code","target":0.02,"kl_mean":0.01,"log_perplexity_ratio":0.0,"oracle_cells":40"#;
        std::fs::write(&path, format!("{task}\n{{\"kind\":\"adaptivity\",{run},{cells},{spent}}}\n")).unwrap();
        let records = read(&path).unwrap().records;
        assert!(matches!(&records[..], [Record::Task(_), Record::Adaptivity(_)]), "{records:?}");
    }
}
