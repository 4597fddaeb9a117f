//! Invariants of session files with arbitrary content. The checksum is always correct, so that all of the file is read. Used by the tests
//! and by cargo-fuzz. A program that includes this file has `edit` and `tiny` at its root, and `use gvote::llama` for the latter.

use std::cell::RefCell;
use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use gvote::llama::{ContextParams, FlashAttention, LlamaError, SamplerParams, Token};
use gvote::policy::Params;
use gvote::session::Recall;
use gvote::{Session, SessionError, SessionParams};

use crate::edit::edited;
use crate::tiny;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    Refused,
    Taken,
}

/// Tokens before the vote, and after it.
const N: [usize; 2] = [140, 10];
const CELLS: usize = 100;
/// Tokens of the vocabulary that are not markup: chat markers would prevent the vote.
const N_TEXT: usize = tiny::N_VOCAB - tiny::MARKUP.len();

/// A session, and the file that it wrote.
struct Saved {
    session: Session,
    path: PathBuf,
    /// The file without the checksum.
    sound: Vec<u8>,
    _folder: tempfile::TempDir,
}

thread_local! {
    static SAVED: RefCell<Saved> = RefCell::new(Saved::new());
}

/// Checks a file with the changes that `data` describes.
pub fn check(data: &[u8]) -> Outcome {
    SAVED.with_borrow_mut(|saved| saved.check(data))
}

fn words(n: usize, kind: usize) -> Vec<Token> {
    (0..n).map(|i| ((7 * i + i * i / 5 + kind) % N_TEXT) as Token).collect()
}

fn read(session: &mut Session, tokens: &[Token]) {
    session.prefill(tokens, |_, _| ControlFlow::Continue(())).expect("there is room");
}

impl Saved {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("there is room for a model");
        let spec = tiny::Spec { vocabulary: true, ..tiny::SPECS[0] };
        let model = tiny::Tiny::new(folder.path(), spec).model;
        let context = ContextParams {
            n_ctx: 256,
            n_ubatch: 64,
            n_threads: 1,
            n_threads_batch: 1,
            flash_attn: FlashAttention::Off,
            ..ContextParams::default()
        };
        // a small state: the captured observation window is most of the data before the cells
        let policy = Params {
            window: 4,
            samples: 2,
            target_kl: None,
            max_cells: Some(CELLS),
            protect: true,
            ..Params::default()
        };
        let params = SessionParams { context, policy, recall: Recall::Auto, ..Default::default() };
        let mut session = Session::new(&model, &params).expect("a context is made");
        read(&mut session, &words(N[0], 0));
        session.compress().expect("it votes");
        assert_eq!(session.cells_used(), CELLS);
        session.mark();
        // with all rows, some of which are set aside again
        read(&mut session, &words(N[1], 3));
        session.compress().expect("it votes");
        assert_eq!((session.cells_used(), session.rows_aside()), (CELLS, N[0] + N[1] - CELLS));
        let path = folder.path().join("session");
        session.save_to(&path, b"a note").expect("there is room for a file");
        let mut sound = fs::read(&path).expect("it was written");
        sound.truncate(sound.len() - blake3::OUT_LEN);
        Self { session, path, sound, _folder: folder }
    }

    /// Loads a file with these bytes and their checksum.
    fn load(&mut self, bytes: &[u8]) -> Result<(), String> {
        let checksum = blake3::hash(bytes);
        fs::write(&self.path, [bytes, checksum.as_bytes()].concat()).expect("there is room for a file");
        self.session.load_from(&self.path, |_| Ok(())).map_err(|error| error.to_string())
    }

    fn check(&mut self, data: &[u8]) -> Outcome {
        let sound = self.sound.clone();
        self.load(&sound).expect("a sound file is taken");
        let before = self.session.save();
        match self.load(&edited(sound, data)) {
            Err(error) => {
                assert!(!error.is_empty() && !error.contains('\n'), "{error}");
                assert!(self.session.save() == before, "a refused file left something behind");
                Outcome::Refused
            }
            Ok(()) => {
                self.use_it();
                Outcome::Taken
            }
        }
    }

    /// Performs every operation on the session.
    fn use_it(&mut self) {
        let Self { session, path, .. } = self;
        assert!(session.cells_used() <= session.n_ctx() && session.exact_from() <= session.n_past());
        session.save_to(path, b"").expect("there is room for a file");
        session.load_from(path, |_| Ok(())).expect("what was taken is taken again");
        // a vote may fail for lack of data
        let _ = session.compress();
        let penalties = SamplerParams { repeat_penalty: 1.1, ..SamplerParams::default() };
        let mut sampler = session.sampler(&penalties, 2).expect("these are settings");
        session.model().detokenize(session.sequence().tokens(), true);
        let read = session.prefill(&words(3, 7), |_, _| ControlFlow::Continue(()));
        match read.and_then(|_| session.generate(&mut sampler, 2, |_| ControlFlow::Continue(())).map(drop)) {
            // the cells may hold values that are not numbers
            Ok(()) | Err(SessionError::Llama(LlamaError::NotANumber)) => {}
            Err(error) => panic!("it does not go on: {error}"),
        }
        let exact_from = session.exact_from();
        session.truncate(exact_from).expect("it can be cut there");
    }
}
