//! Generates needle-in-a-haystack samples: a number hidden in meaningless text of any length, at any depth, without
//! files.

mod filler;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Metric, Sample};
use filler::Filler;

/// Words of the keys. The filler contains none of them.
const COLOURS: [&str; 16] = [
    "amber",
    "azure",
    "bronze",
    "cobalt",
    "copper",
    "coral",
    "crimson",
    "emerald",
    "golden",
    "indigo",
    "ivory",
    "maroon",
    "olive",
    "scarlet",
    "turquoise",
    "violet",
];
const ANIMALS: [&str; 16] = [
    "badger", "beetle", "dolphin", "falcon", "gecko", "heron", "jaguar", "lynx", "magpie", "otter", "panther", "raven",
    "salmon", "tortoise", "walrus", "zebra",
];

/// Token limit of an answer. A number has seven digits and the prefix contains the rest, so any tokenizer needs fewer.
const MAX_TOKENS: i32 = 32;

/// Number of sentences in a paragraph: the minimum, and the number of possible lengths.
const PARAGRAPH: (usize, usize) = (4, 5);

/// Default depths of a grid.
pub const DEPTHS: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];

const INSTRUCTION: &str = "The text below gives magic numbers of several animals. Remember them: \
    one of them will be asked for.\n\n";

/// Generates a text of about `words` words (up to one sentence more, not counting the instruction).
///
/// The needle is placed at the sentence boundary nearest to `depth`: 0 is the start of the text, 1 its end; values
/// outside are clamped.
///
/// The text also has four numbers with other keys, two of which share a word with the requested key. The text depends
/// only on the three arguments, on any machine.
pub fn generate(words: usize, depth: f64, seed: u64) -> Sample {
    let depth = depth.clamp(0.0, 1.0);
    let mut random = Random::new(words, depth, seed);
    let [needle, others @ ..] = needles(&mut random);
    let mut have = others.iter().map(|other| count(&other.sentence())).sum::<usize>() + count(&needle.sentence());
    let mut sentences = Vec::new();
    let mut filler = Filler::default();
    while have < words {
        let sentence = filler.sentence(&mut random);
        have += count(&sentence);
        sentences.push(sentence);
    }
    for other in &others {
        sentences.insert(random.below(sentences.len() + 1), other.sentence());
    }
    sentences.insert(nearest(&sentences, depth), needle.sentence());
    let task = format!("{words} words");
    Sample {
        suite: "needle".to_owned(),
        item: format!("{task} {depth} {seed}"),
        task,
        context: INSTRUCTION.to_owned() + &paragraphs(&sentences, &mut random),
        question: format!("What is the magic number of the {}?", needle.key),
        answer_prefix: format!(" The magic number of the {} is", needle.key),
        references: vec![needle.number.to_string()],
        metric: Metric::ShareFound,
        max_tokens: MAX_TOKENS,
        depth: Some(depth),
    }
}

/// Generates a sample for each length, in words, and each depth; lengths change last. Each text is independent of the
/// other cells of the grid.
pub fn grid(lengths: &[usize], depths: &[f64], seed: u64) -> Vec<Sample> {
    lengths.iter().flat_map(|&words| depths.iter().map(move |&depth| generate(words, depth, seed))).collect()
}

struct Needle {
    key: String,
    number: usize,
}

impl Needle {
    fn sentence(&self) -> String {
        format!("The magic number of the {} is {}.", self.key, self.number)
    }
}

/// Generates the requested needle and four others.
fn needles(random: &mut Random) -> [Needle; 5] {
    let colours: [&str; 4] = random.distinct(COLOURS);
    let animals: [&str; 4] = random.distinct(ANIMALS);
    let mut numbers = Vec::new();
    [(0, 0), (0, 1), (1, 0), (2, 2), (3, 3)].map(|(colour, animal)| {
        let number = loop {
            let number = 1_000_000 + random.below(9_000_000);
            if !numbers.contains(&number) {
                break number;
            }
        };
        numbers.push(number);
        Needle { key: format!("{} {}", colours[colour], animals[animal]), number }
    })
}

/// Returns the number of sentences before the position nearest to `depth`.
fn nearest(sentences: &[String], depth: f64) -> usize {
    let wanted = depth * sentences.iter().map(|sentence| count(sentence)).sum::<usize>() as f64;
    let mut before = 0.0;
    for (i, sentence) in sentences.iter().enumerate() {
        let after = before + count(sentence) as f64;
        if wanted - before <= after - wanted {
            return i;
        }
        before = after;
    }
    sentences.len()
}

fn paragraphs(sentences: &[String], random: &mut Random) -> String {
    let mut text = String::new();
    let mut rest = sentences;
    while !rest.is_empty() {
        let (paragraph, after) = rest.split_at((PARAGRAPH.0 + random.below(PARAGRAPH.1)).min(rest.len()));
        text += &paragraph.join(" ");
        text += "\n\n";
        rest = after;
    }
    text
}

fn count(sentence: &str) -> usize {
    sentence.split_whitespace().count()
}

/// A random generator whose values stay the same between versions of `rand`.
struct Random(ChaCha8Rng);

impl Random {
    fn new(words: usize, depth: f64, seed: u64) -> Self {
        let mut key = [0; 32];
        for (part, of) in key.chunks_mut(8).zip([seed, words as u64, depth.to_bits()]) {
            part.copy_from_slice(&of.to_le_bytes());
        }
        Self(ChaCha8Rng::from_seed(key))
    }

    /// Draws uniformly from `0..n`, for `n` far below 2^32.
    fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.0.next_u32()) * n as u64) >> 32) as usize
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }

    /// Draws `K` different words of `N`.
    fn distinct<const N: usize, const K: usize>(&mut self, mut from: [&'static str; N]) -> [&'static str; K] {
        std::array::from_fn(|i| {
            from.swap(i, i + self.below(N - i));
            from[i]
        })
    }
}
