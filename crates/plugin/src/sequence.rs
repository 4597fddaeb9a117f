//! Where a sequence is: in a prompt, or in an answer, as its batches tell.

#![forbid(unsafe_code)]

use super::batch::Part;

/// What the next batch of a sequence is to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// A new text begins: what votes set aside is needed again.
    Begins,
    /// More of a prompt.
    GoesOn,
    /// Tokens of the answer that began at this position.
    Answers(i32),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    New,
    /// A prompt is read; whether logits were asked for at its end.
    Prompt { is_over: bool },
    /// An answer is written, from this position on.
    Answer { start: i32 },
}

/// A sequence of a context.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sequence {
    phase: Phase,
    /// The position after the last one that was decoded.
    end: i32,
    /// Cells may hold different tokens in different heads.
    pub is_voted: bool,
}

impl Sequence {
    /// What a batch of it is. A token at a time, each with logits, directly behind a prompt is an answer; drafts of a few tokens may
    /// follow there.
    pub fn meets(&self, part: &Part) -> Next {
        let follows = part.first == self.end && part.n_outputs == part.n;
        match self.phase {
            Phase::Answer { start } if follows => Next::Answers(start),
            Phase::Prompt { is_over: true } if follows && part.n == 1 => Next::Answers(part.first),
            Phase::Prompt { is_over: false } if part.first == self.end => Next::GoesOn,
            _ => Next::Begins,
        }
    }

    /// A batch of it was decoded.
    pub fn was_decoded(&mut self, part: &Part) {
        self.phase = match self.meets(part) {
            Next::Answers(start) => Phase::Answer { start },
            Next::Begins | Next::GoesOn => Phase::Prompt { is_over: part.n_outputs > 0 },
        };
        self.end = part.last + 1;
        if part.first == 0 {
            // all that it was before is gone
            self.is_voted = false;
        }
    }

    /// Its end was cut off: an answer goes on where that is behind its beginning, as drafts do that were wrong.
    pub fn was_cut(&mut self, pos: i32) {
        self.end = self.end.min(pos);
        match self.phase {
            Phase::Answer { start } if pos > start => {}
            _ => self.phase = Phase::New,
        }
    }

    /// Something else was done to it.
    pub fn was_changed(&mut self) {
        self.phase = Phase::New;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(first: i32, n: usize, n_outputs: usize) -> Part {
        Part { n, n_outputs, first, last: first + n as i32 - 1 }
    }

    /// What each of these batches is.
    fn walk(sequence: &mut Sequence, parts: &[Part]) -> Vec<Next> {
        let step = |part: &Part| {
            let next = sequence.meets(part);
            sequence.was_decoded(part);
            next
        };
        parts.iter().map(step).collect()
    }

    #[test]
    fn an_answer_begins_behind_the_last_token_of_the_prompt() {
        let parts = [part(0, 512, 0), part(512, 100, 1), part(612, 1, 1), part(613, 1, 1)];
        let met = walk(&mut Sequence::default(), &parts);
        assert_eq!(met, [Next::Begins, Next::GoesOn, Next::Answers(612), Next::Answers(612)]);
    }

    #[test]
    fn a_last_batch_of_one_token_belongs_to_the_prompt() {
        let met = walk(&mut Sequence::default(), &[part(0, 512, 0), part(512, 1, 1), part(513, 1, 1)]);
        assert_eq!(met, [Next::Begins, Next::GoesOn, Next::Answers(513)]);
    }

    #[test]
    fn the_next_turn_begins_a_text() {
        let parts = [part(0, 9, 1), part(9, 1, 1), part(10, 20, 1), part(30, 1, 1)];
        let met = walk(&mut Sequence::default(), &parts);
        assert_eq!(met, [Next::Begins, Next::Answers(9), Next::Begins, Next::Answers(30)]);
    }

    #[test]
    fn drafts_belong_to_the_answer_and_may_be_taken_back() {
        let mut sequence = Sequence::default();
        walk(&mut sequence, &[part(0, 9, 1), part(9, 1, 1)]);
        assert_eq!(walk(&mut sequence, &[part(10, 4, 4)]), [Next::Answers(9)]);
        sequence.was_cut(11);
        assert_eq!(walk(&mut sequence, &[part(11, 4, 4)]), [Next::Answers(9)]);
    }

    #[test]
    fn an_answer_that_is_written_again_begins_a_text() {
        let mut sequence = Sequence::default();
        walk(&mut sequence, &[part(0, 9, 1), part(9, 1, 1), part(10, 1, 1)]);
        sequence.was_cut(8);
        assert_eq!(walk(&mut sequence, &[part(8, 1, 1), part(9, 1, 1)]), [Next::Begins, Next::Answers(9)]);
    }

    #[test]
    fn logits_of_every_token_make_no_answer_of_a_prompt() {
        let met = walk(&mut Sequence::default(), &[part(0, 512, 512), part(512, 512, 512)]);
        assert_eq!(met, [Next::Begins, Next::Begins]);
    }
}
