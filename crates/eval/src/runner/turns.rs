//! Chats of several questions. Each question is read with the rows kept by earlier turns, voted on, and answered.

use std::ops::ControlFlow;

use super::{EvalError, Runner};
use crate::record::{Record, TaskScore};
use crate::tasks::turns::Talk;
use gvote::llama::Token;
use gvote::session::Recall;
use gvote_chat::{ChatTemplate, Message, Role};

/// Token limit for the answer to an opening: more than "OK." needs.
const OPENING_TOKENS: i32 = 16;

/// The messages so far, and the text whose tokens the cache holds.
struct Chat<'a> {
    template: &'a ChatTemplate,
    messages: Vec<Message>,
    cached: String,
}

impl Runner {
    /// Runs a chat under every configuration that is missing in the journal. Returns the number of added answers.
    ///
    /// # Errors
    /// [`EvalError`]; chats that were completed are in the journal.
    pub fn turns(&mut self, talk: &Talk) -> Result<usize, EvalError> {
        let (Some(first), Some(last)) = (talk.turns.first(), talk.turns.last()) else { return Ok(0) };
        let opens = talk.opening.is_some();
        let missing = self.missing("task", &last.suite, &last.item, opens);
        if missing.is_empty() {
            return Ok(0);
        }
        let template = ChatTemplate::of(self.session.model());
        let begin = || Chat { template: &template, messages: Vec::new(), cached: String::new() };
        let (message, prefix) = match &talk.opening {
            Some(opening) => (opening.clone(), ""),
            None => (first.full_turn(), first.answer_prefix.trim_start()),
        };
        let tokens = begin().say(self, &message, prefix)?;
        let prompt = self.read_prompt(tokens, 0)?;
        let mut added = 0;
        for (config, mut run) in missing {
            self.session.set_more_questions(true);
            self.compress(&prompt, &config, Recall::Auto, &mut run)?;
            let mut chat = begin();
            chat.say(self, &message, prefix)?;
            if opens {
                chat.hear(self, prefix, OPENING_TOKENS)?;
            }
            let mut records = Vec::new();
            for (i, turn) in talk.turns.iter().enumerate() {
                let prefix = turn.answer_prefix.trim_start();
                if i > 0 || opens {
                    let tokens = chat.say(self, &turn.full_turn(), prefix)?;
                    self.session.prefill_long(&tokens, |_, _| ControlFlow::Continue(()))?;
                    if !config.is_full() {
                        self.session.compress()?;
                    }
                    (run.tokens, run.cells) = (self.session.n_past() as usize, self.session.cells_used());
                }
                let answer = chat.hear(self, prefix, turn.max_tokens)?;
                run.item = turn.item.clone();
                records.push(Record::Task(TaskScore {
                    run: run.clone(),
                    suite: turn.suite.clone(),
                    task: turn.task.clone(),
                    score: turn.score(&answer),
                    answer,
                    depth: turn.depth,
                }));
            }
            added += records.len();
            records.into_iter().try_for_each(|record| self.add(record))?;
        }
        self.session.set_recall(Recall::Off);
        self.session.set_more_questions(false);
        Ok(added)
    }
}

impl Chat<'_> {
    /// Adds a message of the user and the beginning of its answer. Returns the tokens to add to the cache.
    fn say(&mut self, runner: &mut Runner, message: &str, prefix: &str) -> Result<Vec<Token>, EvalError> {
        self.messages.push(Message::new(Role::User, message));
        let text = self.template.render_answer(&self.messages, prefix)?;
        let model = runner.session.model();
        let tokens = if self.cached.is_empty() {
            text.tokens(model)?
        } else if text.text().starts_with(&self.cached) {
            text.tokens_from(model, self.cached.len())?
        } else {
            // The template rewrites earlier messages.
            let tokens = text.tokens(model)?;
            runner.session.clear();
            tokens
        };
        self.cached = text.text().to_owned();
        Ok(tokens)
    }

    /// Generates the model's answer.
    fn hear(&mut self, runner: &mut Runner, prefix: &str, max_tokens: i32) -> Result<String, EvalError> {
        let start = runner.session.n_past() as usize;
        let answer = runner.answer(max_tokens)?;
        let model = runner.session.model();
        self.cached += &model.detokenize(&runner.session.sequence().tokens()[start..], false);
        let answer = model.detokenize(&answer, false);
        self.messages.push(Message::new(Role::Assistant, prefix.to_owned() + &answer));
        Ok(answer)
    }
}
