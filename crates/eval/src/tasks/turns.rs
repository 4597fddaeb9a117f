//! Several questions about one document in one chat. Tests whether a vote for the first question keeps the cells that
//! the later questions need.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Sample;

/// End of the opening message in a chat whose questions come later.
const READ: &str = "Read this. I will ask you about it afterwards. Only say OK.";

/// A chat about one document.
#[derive(Clone, Debug, PartialEq)]
pub struct Talk {
    /// The document and an announcement of questions, if the document comes before the first question.
    pub opening: Option<String>,
    /// One question each. Without an opening, the first question has the document as its context; the others have none.
    pub turns: Vec<Sample>,
}

/// Forms of needles: the text before the key, between key and number, and after the number.
const FORMS: [[&str; 3]; 4] = [
    ["One of the special magic numbers for ", " is: ", "."],
    ["One of the special magic words for ", " is: ", "."],
    ["One of the special magic uuids for ", " is: ", "."],
    ["The magic number of the ", " is ", "."],
];

/// Creates a chat with `n` questions about the needles of a sample: its own question, then questions about other keys,
/// drawn with `seed`.
///
/// None if the sample has too few needles, or does not ask for the needle of exactly one key. `opens`: the document
/// comes first, without a question.
pub fn talk(sample: &Sample, n: usize, seed: u64, opens: bool) -> Option<Talk> {
    let [reference] = &sample.references[..] else { return None };
    let needles = needles(&sample.context);
    let is_unique = |key: &str| needles.iter().filter(|needle| needle.0 == key).count() == 1;
    let &(asked, _) =
        needles.iter().find(|(key, value)| value == reference && sample.question.contains(key) && is_unique(key))?;
    let mut others: Vec<_> = needles.iter().filter(|(key, _)| *key != asked && is_unique(key)).copied().collect();
    let mut random = ChaCha8Rng::seed_from_u64(seed ^ fnv(&sample.item));
    let mut picked = vec![(asked, reference.as_str())];
    while picked.len() < n {
        if others.is_empty() {
            return None;
        }
        let i = random.next_u32() as usize % others.len();
        picked.push(others.swap_remove(i));
    }
    let turn = |(i, (key, value)): (usize, (&str, &str))| Sample {
        suite: format!("turns/{}", sample.suite),
        task: format!("{}, question {}", sample.task, i + 1),
        item: format!("{} question {}", sample.item, i + 1),
        context: if i == 0 && !opens { sample.context.clone() } else { String::new() },
        question: sample.question.replace(asked, key),
        answer_prefix: sample.answer_prefix.replace(asked, key),
        references: vec![value.to_owned()],
        depth: if i == 0 { sample.depth } else { None },
        ..sample.clone()
    };
    let opening = opens.then(|| sample.context.clone() + READ);
    Some(Talk { opening, turns: picked.into_iter().enumerate().map(turn).collect() })
}

/// Returns the keys and values of the needles in a text, in order.
fn needles(text: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    for [before, between, after] in FORMS {
        for (at, _) in text.match_indices(before) {
            let needle = text[at + before.len()..].split_once(between);
            let parts = needle.and_then(|(key, rest)| Some((key, rest.split_once(after)?.0)));
            // on one line
            found.extend(parts.filter(|(key, value)| !key.contains('\n') && !value.contains(char::is_whitespace)));
        }
    }
    found
}

/// Returns a hash of a name, the same on every machine (FNV-1a).
fn fnv(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::super::needle;
    use super::*;

    #[test]
    fn each_question_asks_for_another_needle_of_the_text() {
        for (seed, opens) in [(0, false), (1, true)] {
            let sample = needle::generate(300, 0.5, 7);
            let talk = talk(&sample, 5, seed, opens).unwrap();
            assert_eq!(talk.opening.is_some(), opens);
            assert_eq!(talk.turns.len(), 5);
            let mut keys = Vec::new();
            for (i, turn) in talk.turns.iter().enumerate() {
                let key = turn.question.strip_prefix("What is the magic number of the ").unwrap().trim_end_matches('?');
                let value = &turn.references[0];
                assert!(sample.context.contains(&format!("The magic number of the {key} is {value}.")), "{turn:?}");
                assert_eq!(turn.answer_prefix, format!(" The magic number of the {key} is"));
                assert_eq!(turn.context.is_empty(), i > 0 || opens);
                assert!(!keys.contains(&key.to_owned()));
                keys.push(key.to_owned());
            }
            assert_eq!(talk.turns[0].references, sample.references);
            assert_eq!(super::talk(&sample, 6, seed, opens), None, "it has five needles");
        }
        let sample = needle::generate(300, 0.5, 7);
        assert_ne!(talk(&sample, 3, 0, false), talk(&sample, 3, 3, false));
    }

    #[test]
    fn needles_of_ruler_are_known() {
        let context = "Hide.\nOne of the special magic numbers for vast-tail is: 123.\n\
                       One of the special magic numbers for lazy-cow is: 456. One of the special magic numbers for lazy-cow is: 7.\n\
                       One of the special magic numbers for dull-key is: 89.\n";
        assert_eq!(
            needles(context),
            [("vast-tail", "123"), ("lazy-cow", "456"), ("lazy-cow", "7"), ("dull-key", "89")]
        );
        let sample = Sample {
            context: context.into(),
            question: "What is the special magic number for dull-key mentioned in the provided text?".into(),
            answer_prefix: " The special magic number for dull-key mentioned in the provided text is".into(),
            references: vec!["89".into()],
            ..needle::generate(10, 0.0, 0)
        };
        let chat = talk(&sample, 2, 0, false).unwrap();
        assert_eq!(chat.turns[1].references, ["123"], "a key with two numbers is not asked for");
        assert!(chat.turns[1].answer_prefix.contains("vast-tail"));
        assert_eq!(talk(&Sample { references: vec!["1".into()], ..sample.clone() }, 1, 0, false), None);
        assert_eq!(talk(&Sample { references: vec!["89".into(), "123".into()], ..sample }, 1, 0, false), None);
    }
}
