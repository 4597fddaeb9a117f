//! Generates meaningless sentences without digits.

use super::Random;

/// Words that replace a placeholder in braces. A `thing` or `quality` may follow an `a`, so none starts with a vowel.
const WORDS: [(&str, &[&str]); 11] = [
    (
        "name",
        &[
            "Marta", "Oskar", "Ingrid", "Tomas", "Nadia", "Felix", "Greta", "Hassan", "Lucia", "Pavel", "Rosa",
            "Simon", "Yuki", "Wanda", "Amir", "Bertha", "Colin", "Dalia", "Emil", "Farah",
        ],
    ),
    (
        "trade",
        &[
            "the baker",
            "the ferryman",
            "the librarian",
            "the gardener",
            "the clockmaker",
            "the postman",
            "the tailor",
            "the schoolteacher",
            "the carpenter",
            "the night porter",
            "the beekeeper",
            "the shepherd",
            "the printer",
            "the cook",
            "the surveyor",
            "the glazier",
        ],
    ),
    (
        "place",
        &[
            "the mill",
            "the harbour",
            "the market square",
            "the railway station",
            "the orchard",
            "the town hall",
            "the chapel",
            "the boathouse",
            "the quarry",
            "the upper meadow",
            "the museum",
            "the reading room",
            "the lighthouse",
            "the river bank",
            "the old quarter",
            "the greenhouse",
            "the brickworks",
            "the hill road",
        ],
    ),
    (
        "thing",
        &[
            "ladder",
            "lantern",
            "basket",
            "kettle",
            "wheelbarrow",
            "barometer",
            "suitcase",
            "ledger",
            "spade",
            "piano",
            "bicycle",
            "curtain",
            "teapot",
            "map",
            "rope",
            "bench",
            "mirror",
            "drum",
            "letter",
            "stove",
        ],
    ),
    (
        "things",
        &[
            "apples",
            "candles",
            "blankets",
            "barrels",
            "bricks",
            "postcards",
            "chairs",
            "seedlings",
            "tickets",
            "jars",
            "nets",
            "shutters",
            "maps",
            "tiles",
            "boots",
            "loaves",
            "ribbons",
            "stamps",
        ],
    ),
    (
        "quality",
        &[
            "heavy",
            "plain",
            "crooked",
            "borrowed",
            "dusty",
            "narrow",
            "wooden",
            "handsome",
            "rusty",
            "faded",
            "cheap",
            "remarkable",
            "curious",
            "broken",
            "sturdy",
            "second-hand",
            "polished",
            "forgotten",
        ],
    ),
    (
        "time",
        &[
            "before breakfast",
            "after the holidays",
            "late in the autumn",
            "on a Tuesday",
            "at the end of the week",
            "during the storm",
            "around noon",
            "on the first warm day",
            "shortly after dark",
            "in the middle of March",
            "while the others slept",
            "at low tide",
            "on market days",
            "towards evening",
            "the following spring",
            "every other Sunday",
        ],
    ),
    (
        "sky",
        &[
            "rain",
            "fog",
            "a cold wind",
            "bright sunshine",
            "sleet",
            "a light frost",
            "thunder",
            "drizzle",
            "snow",
            "a warm breeze",
            "low cloud",
            "hail",
        ],
    ),
    (
        "did",
        &[
            "mended the roof",
            "counted the barrels",
            "painted the gate",
            "swept the yard",
            "wrote to a cousin",
            "missed the last bus",
            "planted beans",
            "repaired the pump",
            "told a long story",
            "lost a glove",
            "bought fresh bread",
            "sharpened the knives",
            "waited for news",
            "closed the windows",
            "played cards",
            "sorted the post",
            "carried water",
            "sang off key",
        ],
    ),
    (
        "because",
        &[
            "because the bridge was closed",
            "since nobody else would",
            "for want of a better plan",
            "as the doctor had advised",
            "because the days were getting shorter",
            "out of habit",
            "to the surprise of the neighbours",
            "as was the custom there",
            "although it was hardly needed",
            "without saying a word",
            "in spite of the noise",
            "because a letter had come",
            "to pass the time",
            "as if it were a holiday",
        ],
    ),
    (
        "feeling",
        &[
            "relieved",
            "puzzled",
            "delighted",
            "tired",
            "proud",
            "uneasy",
            "amused",
            "hopeful",
            "bored",
            "grateful",
            "impatient",
            "calm",
        ],
    ),
];

/// Sentence forms. Each placeholder in braces is replaced by an independent draw.
const SENTENCES: [&str; 40] = [
    "{time}, {trade} {did} {because}.",
    "{name} carried a {quality} {thing} to {place}.",
    "there was {sky} over {place}, and {name} stayed at home.",
    "{name} and {name} talked about the {things} until it was too late to leave.",
    "nobody at {place} could say who owned the {quality} {thing}.",
    "{trade} asked for more {things}, but {name} only shrugged.",
    "from {place} one could see the smoke, and sometimes {place} behind it.",
    "the {thing} that {name} had ordered arrived {time}.",
    "{time} came {sky}, then {sky}, and by nightfall the paths were empty.",
    "{trade} kept the {things} in a {quality} box near {place}.",
    "it was said of {name} that no {thing} at {place} was safe.",
    "{name} {did}, and {name} {did}, {because}.",
    "what {trade} wanted most was a {quality} {thing}.",
    "the road between {place} and {place} had been flooded by {sky}.",
    "{name} felt {feeling} when {trade} spoke of {place}.",
    "in the end the {things} were sold and the {thing} was given away.",
    "a {quality} {thing} stood beside the door, and no one dared to move it.",
    "{trade} had promised to return {time}, yet the {thing} was still there.",
    "if the {things} were not ready, {name} would simply wait.",
    "they met at {place} {time}, {because}.",
    "\"The {thing} is {quality},\" said {name}, and went back to work.",
    "{name} looked {feeling}, while {trade} looked merely {feeling}.",
    "most of the {things} from {place} turned out to be {quality}.",
    "after {sky}, {place} smelled of wet leaves.",
    "{trade} taught {name} how to look after {things}.",
    "{time}, the children ran from {place} with {things} in their arms.",
    "neither {name} nor {trade} remembered where the {quality} {things} had come from.",
    "a letter from {name} lay under the {thing} for several weeks.",
    "the council argued about {place} and then, {because}, about {things}.",
    "{name} would rather have had a {thing} than all those {quality} {things}.",
    "there are two ways to {place}, and {trade} prefers the longer one.",
    "{time}, {name} {did}; {trade} {did} as well.",
    "how the {thing} had reached {place} remained a question for {trade}.",
    "{sky} is common there, so {name} never goes out without a {quality} coat.",
    "{trade} was {feeling} to find {things} where the {thing} used to be.",
    "once a year {place} is closed, and {name} {did} there {because}.",
    "the guidebook mentions {place}, but not the {quality} {things} for sale nearby.",
    "{name} bought a {thing} from {trade} and regretted it {time}.",
    "behind {place} grows a hedge that {trade} trims {time}.",
    "some people are {feeling} in {sky}; {name} is not one of them.",
];

/// A source of sentences. Consecutive sentences never have the same form.
#[derive(Default)]
pub(super) struct Filler {
    last: Option<usize>,
}

impl Filler {
    pub fn sentence(&mut self, random: &mut Random) -> String {
        let mut form = random.below(SENTENCES.len());
        while Some(form) == self.last {
            form = random.below(SENTENCES.len());
        }
        self.last = Some(form);
        capitalised(fill(SENTENCES[form], random))
    }
}

/// Fills all placeholders of a sentence, without using a word twice.
fn fill(form: &str, random: &mut Random) -> String {
    let mut text = String::new();
    let mut used: Vec<&str> = Vec::new();
    for part in form.split(['{', '}']) {
        let Some((_, words)) = WORDS.iter().find(|(kind, _)| *kind == part) else {
            text += part;
            continue;
        };
        let mut word = random.pick(words);
        while used.contains(&word) {
            word = random.pick(words);
        }
        used.push(word);
        text += word;
    }
    text
}

fn capitalised(mut text: String) -> String {
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_of_every_sentence_has_words() {
        let mut random = Random::new(0, 0.0, 0);
        for form in SENTENCES {
            let text = fill(form, &mut random);
            assert!(form.contains('{') && form.ends_with('.') && form.len() < 100, "{form}");
            for part in form.split('{').skip(1) {
                let (kind, _) = part.split_once('}').expect("closed");
                assert!(WORDS.iter().any(|(name, words)| *name == kind && words.len() >= 12), "{kind} in {form}");
            }
            assert!(!text.contains(['{', '}']) && !text.contains("  "), "{text}");
        }
    }

    #[test]
    fn a_long_text_hardly_repeats_itself() {
        let (mut filler, mut random) = (Filler::default(), Random::new(0, 0.0, 7));
        let sentences: Vec<String> = (0..1000).map(|_| filler.sentence(&mut random)).collect();
        let different: std::collections::HashSet<&String> = sentences.iter().collect();
        assert!(different.len() > 980, "{}", different.len());
        assert!(sentences.windows(2).all(|two| two[0] != two[1]));
        assert!(
            sentences.iter().all(|s| !s.contains(|c: char| c.is_ascii_digit()) && !s.starts_with(char::is_lowercase))
        );
    }
}
