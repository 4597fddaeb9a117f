//! Saved sessions with one changed number: refused, or loaded as a usable session.

use std::path::Path;

use super::*;
use crate::archive::RecallType;
use crate::compact::row_bytes;
use crate::llama::ModelParams;
use crate::tests::fixture::F16;

/// Tokens of the saved session, before a vote and after it.
const N: [usize; 2] = [230, 20];
/// A short window, which keeps states small.
const WINDOW: usize = 8;

/// A number in a saved session.
struct Field {
    name: String,
    at: usize,
    len: usize,
}

/// Iterates over the numbers of a saved session; see `head` in `src/session/state.rs`.
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
    found: Vec<Field>,
}

impl Fields<'_> {
    fn number(&mut self, name: &str, len: usize) -> u64 {
        self.found.push(Field { name: name.into(), at: self.at, len });
        let mut number = [0; 8];
        number[..len].copy_from_slice(&self.bytes[self.at..][..len]);
        self.at += len;
        u64::from_le_bytes(number)
    }

    /// Passes `n` numbers, and records the first, the second, the middle and the last one.
    fn several(&mut self, name: &str, n: usize, len: usize) {
        let start = self.at;
        for i in [0, 1, n / 2, n - n.min(1)].into_iter().filter(|&i| i < n) {
            self.at = start + i * len;
            self.number(&format!("{name}[{i}]"), len);
        }
        self.at = start + n * len;
    }

    /// Passes a part: records its length and four of its numbers.
    fn list(&mut self, name: &str) {
        let bytes = self.number(&format!("length of {name}"), 8) as usize;
        self.several(name, bytes / 4, 4);
    }

    fn captured(&mut self, name: &str, session: &Session) {
        self.number(&format!("{name}: length"), 8);
        self.number(&format!("{name}: tokens"), 8);
        let layers = session.layout().unwrap().layers.iter().map(|l| (l.n_head * l.n_embd_head_k) as usize);
        for (il, n_q) in layers.enumerate() {
            let name = format!("{name}, layer {il}");
            let n = self.number(&format!("{name}: channels"), 8) as usize;
            self.number(&format!("{name}: count"), 8);
            self.several(&format!("{name}: moments"), 2 * n, 8);
            self.several(&format!("{name}: positions"), WINDOW, 4);
            self.several(&format!("{name}: queries"), WINDOW * n_q, 2);
            self.several(&format!("{name}: scale"), 3, 4);
        }
    }

    fn saved(&mut self, session: &Session) {
        self.number("length of what is known", 8);
        self.several("magic", 2, 4);
        self.number("n_past", 4);
        self.number("exact_from", 4);
        self.list("labels");
        self.list("tokens");
        self.number("cells of heads", 8);
        self.list("positions of heads");
        self.list("protected");
        self.captured("captured", session);
    }

    /// Passes one of llama.cpp's caches.
    fn cells(&mut self, name: &str) {
        self.number(&format!("{name}: streams"), 4);
        let n = self.number(&format!("{name}: cells"), 4) as usize;
        self.several(&format!("{name}: cell"), 3 * n, 4);
        self.several(&format!("{name}: shape"), 2, 4);
        self.number(&format!("{name}: type"), 4);
        self.number(&format!("{name}: row"), 8);
    }

    fn recurrent(&mut self) {
        self.several("recurrent", 6, 4);
        self.number("recurrent: row", 8);
    }
}

/// Returns the numbers of a saved session.
fn fields(session: &mut Session, bytes: &[u8]) -> Vec<Field> {
    let model = session.model().clone();
    let uncut = session.ctx.copy_uncut(SEQ).unwrap().len();
    let mut fields = Fields { bytes, at: 0, found: Vec::new() };
    let head = fields.number("length of the head", 8) as usize;
    fields.number("votes", 1);
    fields.list("logits");
    if session.voter.is_some() {
        fields.saved(session);
    } else {
        fields.list("tokens");
    }
    for i in 0.. {
        if fields.at == 8 + head {
            break;
        }
        fields.number(&format!("mark {i}"), 4);
        fields.list(&format!("logits of mark {i}"));
        if session.voter.is_some() {
            fields.captured(&format!("mark {i}"), session);
        }
    }
    for batch in 0..fields.number("batches set aside", 8) {
        let n = fields.number(&format!("rows of batch {batch} that are set aside"), 8) as usize;
        for (head, bytes) in row_bytes(&Layout::of(&session.ctx, SEQ).unwrap(), RecallType::Cache).enumerate() {
            fields.several(&format!("positions of head {head} in batch {batch} that are set aside"), n, 4);
            fields.at += n * bytes;
        }
    }
    // the part that cannot be cut is a recurrent state, a window cache, or the whole state
    if !model.is_recurrent() || uncut < bytes.len() - fields.at {
        fields.cells("cache");
    }
    fields.at = bytes.len() - uncut;
    if model.is_recurrent() {
        fields.recurrent();
    } else if has_window(session) {
        fields.cells("window");
    }
    fields.found
}

/// Returns values for a number: limits, nonsense, and neighbours of its own value, which is included.
fn values(field: &Field, bytes: &[u8]) -> Vec<Vec<u8>> {
    let own = &bytes[field.at..][..field.len];
    let near = |own: u64| [own.wrapping_add(1), own.wrapping_sub(1), 0, 1, 2];
    let values = match own.len() {
        4 => {
            let ids = [N_VOCAB as i32, 2_000_000_000, i32::MAX, i32::MIN, -1, -2].map(|n| u64::from(n as u32));
            let floats = [f32::NAN, f32::INFINITY, f32::MAX].map(|x| u64::from(x.to_bits()));
            let own = u64::from(u32::from_le_bytes(own.try_into().unwrap()));
            [&near(own)[..], &ids, &floats].concat()
        }
        8 => {
            let lengths = [1 << 31, 1 << 32, 1 << 62, u64::MAX];
            let floats = [f64::NAN, f64::INFINITY, f64::MAX, -1.0].map(f64::to_bits);
            let own = u64::from_le_bytes(own.try_into().unwrap());
            [&near(own)[..], &lengths, &floats].concat()
        }
        // infinity and NaN as f16; the flag that the session votes
        _ => vec![0, 1, 2, 0xff, 0x7c00, 0x7e00, 0xfc00],
    };
    let values = values.into_iter().map(|value| value.to_le_bytes()[..own.len()].to_vec());
    values.filter(|value| value != own).collect()
}

/// Runs every operation on a session.
fn use_it(session: &mut Session, name: &str) {
    assert!(session.cells_used() <= session.n_ctx(), "{name}");
    let marks: Vec<Pos> = session.marks.iter().map(|mark| mark.pos).collect();
    assert!(marks.iter().all(|&pos| pos <= session.n_past()) && session.exact_from() <= session.n_past(), "{name}");
    let saved = session.save();
    session.load(&saved).unwrap_or_else(|error| panic!("{name}: what was taken is refused later: {error}"));
    // a vote may find no captured data
    let _ = session.compress();
    session.expand().unwrap_or_else(|error| panic!("{name}: it does not come back: {error}"));
    let _ = session.compress();
    session.mark();
    let mut sampler = session.sampler(&SamplerParams { repeat_penalty: 1.1, ..SamplerParams::default() }, 4).unwrap();
    session.model().detokenize(session.sequence().tokens(), true);
    if !session.logits().is_empty() {
        session.generate(&mut sampler, 2, |_| ControlFlow::Continue(())).unwrap();
    }
    let room = session.n_ctx() - session.cells_used();
    if room > 5 {
        read(session, &words(5, 3));
    }
    for pos in marks.into_iter().rev() {
        if session.truncate(pos).is_ok() && !session.logits().is_empty() {
            session.generate(&mut sampler, 1, |_| ControlFlow::Continue(())).unwrap();
        }
    }
}

fn has_window(session: &Session) -> bool {
    Layout::of(&session.ctx, SEQ).is_ok_and(|layout| layout.info.has_window)
}

/// Whether a session equals the one that saved these bytes. With a window cache, loaded cells may lie elsewhere.
fn is_as(session: &mut Session, sound: &[u8]) -> bool {
    let saved = session.save();
    let has_window =
        session.ctx.copy_uncut(SEQ).is_ok_and(|uncut| !uncut.is_empty()) && !session.model().is_recurrent();
    let end = if has_window { 8 + u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize } else { sound.len() };
    saved.len() == sound.len() && saved[..end] == sound[..end]
}

/// Changes every number of a saved session in turn. Returns how many changes were accepted, and how many refused.
fn change_all(session: &mut Session, sound: &[u8]) -> [usize; 2] {
    change(session, sound, |_| true)
}

/// Changes the numbers whose names `is_meant` accepts.
fn change(session: &mut Session, sound: &[u8], is_meant: impl Fn(&str) -> bool) -> [usize; 2] {
    let mut counts = [0; 2];
    for field in fields(session, sound).into_iter().filter(|field| is_meant(&field.name)) {
        for value in values(&field, sound) {
            let name = format!("{} is {value:?}", field.name);
            let mut bytes = sound.to_vec();
            bytes[field.at..][..field.len].copy_from_slice(&value);
            match session.load(&bytes) {
                Ok(()) => {
                    use_it(session, &name);
                    session.load(sound).unwrap_or_else(|error| panic!("{name}: the sound one is refused: {error}"));
                    counts[0] += 1;
                }
                Err(error) => {
                    let error = error.to_string();
                    assert!(!error.is_empty() && !error.contains('\n'), "{name}: {error}");
                    assert!(is_as(session, sound), "{name}: what was refused ({error}) left something behind");
                    counts[1] += 1;
                }
            }
        }
    }
    counts
}

/// Returns a session with marks, after a vote, and its saved bytes.
fn saved(mut session: Session) -> (Session, Vec<u8>) {
    session.mark();
    read(&mut session, &words(N[0], 1));
    session.compress().unwrap();
    session.mark();
    read(&mut session, &words(N[1], 2));
    let bytes = session.save();
    (session, bytes)
}

fn with_vocabulary(arch: &str) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let spec = tiny::SPECS.into_iter().find(|spec| spec.arch == arch).unwrap();
    tiny::Tiny::new(folder.path(), tiny::Spec { vocabulary: true, ..spec }).model
}

/// Settings like [`quick`], with the vocabulary's markers protected.
fn protecting() -> Params {
    Params { protect: true, window: WINDOW, ..quick() }
}

#[test]
fn a_token_that_the_vocabulary_has_not_is_refused_before_anything_looks_it_up() {
    let (mut session, sound) = saved(open_with(&with_vocabulary("llama"), F16, N_CTX, protecting()));
    let tokens: Vec<Field> = fields(&mut session, &sound);
    let tokens: Vec<&Field> = tokens.iter().filter(|field| field.name.starts_with("tokens[")).collect();
    assert_eq!(tokens.len(), 4);
    for field in tokens {
        for token in [N_VOCAB as Token, 2_000_000_000, Token::MAX, -2, Token::MIN] {
            let mut bytes = sound.clone();
            bytes[field.at..][..4].copy_from_slice(&token.to_le_bytes());
            let error = session.load(&bytes).unwrap_err().to_string();
            assert!(error.contains("another model"), "{} is {token}: {error}", field.name);
        }
    }
    session.load(&sound).unwrap();
}

#[test]
fn no_number_in_a_saved_session_does_harm() {
    let (mut session, sound) = saved(open_with(&with_vocabulary("llama"), F16, N_CTX, protecting()));
    assert!(session.exact_from() > 0, "heads hold different tokens");
    let [taken, refused] = change_all(&mut session, &sound);
    assert!(taken > 50 && refused > 500, "{taken} taken, {refused} refused");
}

#[test]
fn no_other_number_is_taken_for_one_in_what_is_set_aside() {
    let policy = Params { max_cells: Some(120), ..protecting() };
    let (mut session, _) = saved(open_as(&with_vocabulary("llama"), F16, N_CTX, policy, Recall::Auto));
    // rows that the first vote dropped came back for the tokens read since
    assert_eq!(session.rows_aside(), 0);
    session.compress().unwrap();
    assert!(session.rows_aside() > 0 && session.exact_from() == 0);
    let sound = session.save();
    // all rows of a head are in one place only, so that any other position belongs to another row
    let [taken, refused] = change(&mut session, &sound, |name| name.contains("set aside"));
    assert!(taken == 0 && refused > 200, "{taken} taken, {refused} refused");
}

#[test]
fn nor_does_one_beside_a_window_or_a_recurrent_state_or_under_the_full_policy() {
    let folder = tempfile::tempdir().unwrap();
    let model = |path: &Path| Model::load(path, &ModelParams::default(), |_| true).unwrap();
    let recurrent = tiny::RECURRENT.map(|arch| model(&tiny::recurrent(folder.path(), arch)));
    let full = Params::new(Kind::Full);
    let of_window = Params { max_cells: Some(200), window: WINDOW, protect: true, ..Params::new(Kind::StreamingLlm) };
    let ways = [
        (with_vocabulary("gemma2"), of_window),
        (with_vocabulary("gemma2"), full.clone()),
        (with_vocabulary("llama"), full.clone()),
        (recurrent[0].clone(), full.clone()),
        (recurrent[1].clone(), full),
    ];
    for (model, policy) in ways {
        let (mut session, sound) = saved(open_with(&model, F16, N_CTX, policy));
        let [taken, refused] = change_all(&mut session, &sound);
        assert!(taken > 10 && refused > 50, "{}: {taken} taken, {refused} refused", model.description());
    }
}
