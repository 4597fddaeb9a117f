//! Measures whether a policy's own choice finds the budget that a request needs.

use std::collections::BTreeMap;

use super::{EvalError, Prompt, Reference, Runner};
use crate::config::Config;
use crate::record::{Adaptivity, Record, Run};
use crate::search::{fewest, grid};
use crate::tasks::Sample;
use gvote::SessionError;
use gvote::llama::{Pos, Token};
use gvote::policy::Params;

/// A prompt to compress, with its continuation.
pub struct Request<'a> {
    /// Kind of request, such as narrative.
    pub family: String,
    /// Name of the request, unique within a run file.
    pub item: String,
    pub next: Next<'a>,
}

/// Continuation that the compressed cache is tested on.
pub enum Next<'a> {
    /// The tokens that follow the prompt in a text. Comparisons start after the first one.
    Text { prompt: &'a [Token], next: &'a [Token] },
    /// The full cache's most likely answer, up to `limit` tokens, and the token after it. `blind`: the question follows
    /// only after the compression. `after`: number of answer tokens before the compression, which are not compared.
    Answer { sample: &'a Sample, blind: bool, limit: usize, after: usize },
}

/// Measurements of one ranking of the cells, for one request.
struct Ranking {
    name: String,
    seed: u64,
    params: Params,
    account_error: bool,
    /// Mean KL by cells.
    curve: BTreeMap<usize, f64>,
}

impl Runner {
    /// Measures the choice of every configuration against the fewest cells of the same ranking whose mean KL is at most
    /// a target. Covers all targets that are missing in the journal. Returns the number of added records.
    ///
    /// # Errors
    /// [`EvalError`]; earlier measurements are in the journal. [`EvalError::NoAnswer`] for a task to which the full
    /// cache gives no answer.
    pub fn adaptivity(&mut self, request: &Request, targets: &[f64]) -> Result<usize, EvalError> {
        for config in self.configs.iter().filter(|config| !config.is_full()) {
            let searched = Params { ratio: Some(1.0), ..config.ranking() };
            searched.validate().map_err(SessionError::from)?;
            if config.ctx_size.is_some() {
                return Err(EvalError::CtxSize(config.name.clone()));
            }
        }
        let blind = matches!(request.next, Next::Answer { blind: true, .. });
        let mut missing: Vec<(Config, Run, Vec<f64>)> = Vec::new();
        for &target in targets {
            for (config, run) in self.missing("adaptivity", &target.to_string(), &request.item, blind) {
                match missing.iter_mut().find(|(_, known, _)| *known == run) {
                    Some((.., targets)) => targets.push(target),
                    None => missing.push((config, run, vec![target])),
                }
            }
        }
        missing.retain(|(config, ..)| !config.is_full());
        if missing.is_empty() {
            return Ok(0);
        }
        let reference = self.read(request)?;
        let mut rankings = Vec::new();
        let mut added = 0;
        for (config, mut run, targets) in missing {
            let (own, tried) = self.drift(&reference, &config, &mut run)?;
            let ranking = self.ranking(&config, &run, own.steps, &mut rankings);
            for target in targets {
                let oracle_cells = self.fewest(&reference, ranking, &run, target)?;
                self.add(Record::Adaptivity(Adaptivity {
                    run: run.clone(),
                    family: request.family.clone(),
                    steps: own.steps,
                    target,
                    kl_mean: own.mean_kl(),
                    log_perplexity_ratio: own.log_perplexity_ratio(),
                    oracle_cells,
                    ranking: ranking.name.clone(),
                    curve: ranking.curve.iter().map(|(&cells, &kl)| (cells, kl as f32)).collect(),
                    tried: tried.clone(),
                }))?;
                added += 1;
            }
        }
        Ok(added)
    }

    /// Reads the prompt to compress and follows the full cache from there.
    fn read(&mut self, request: &Request) -> Result<Reference, EvalError> {
        match request.next {
            Next::Text { prompt, next } => {
                let prompt = self.read_prompt(prompt.to_vec(), 0)?;
                self.reference(prompt, next.to_vec(), 0)
            }
            Next::Answer { sample, blind, limit, after } => {
                let [mut context, question] = self.tokens_of(sample)?;
                let system = self.system_of(sample, &context)?;
                if !blind {
                    context.extend(&question);
                }
                let prompt = self.read_prompt(context, system)?;
                let mut tokens = Vec::new();
                if blind {
                    self.prefill(&question)?;
                    tokens = question;
                }
                let from = tokens.len().saturating_sub(1);
                let limit = i32::try_from(limit).unwrap_or(i32::MAX);
                tokens.extend(self.answer(sample.max_tokens.min(limit))?);
                if tokens.is_empty() {
                    return Err(EvalError::NoAnswer(request.item.clone()));
                }
                tokens.push(self.greedy()?.sample(self.session.logits())?);
                if after == 0 {
                    return self.reference(prompt, tokens, from);
                }
                if tokens.len() < after + 2 {
                    return Err(EvalError::NoAnswer(request.item.clone()));
                }
                let next = tokens.split_off(after);
                let start = prompt.tokens.len() as Pos;
                let prompt = self.read_prompt([prompt.tokens, tokens].concat(), system)?;
                self.reference(Prompt { answer: Some(start), ..prompt }, next, 0)
            }
        }
    }

    /// Searches for C* of a ranking.
    fn fewest(
        &mut self,
        reference: &Reference,
        ranking: &mut Ranking,
        run: &Run,
        target: f64,
    ) -> Result<usize, EvalError> {
        let (n, params) = (run.tokens, &ranking.params);
        let least = if params.leaves_alone(n) { n } else { params.sinks + params.recent };
        fewest(&grid(n, least), target, |cells| {
            if let Some(&kl) = ranking.curve.get(&cells) {
                return Ok(kl);
            }
            let params = Params { ratio: Some(cells as f32 / n as f32), ..ranking.params.clone() };
            let account_error = ranking.account_error;
            let config = Config { name: String::new(), params, account_error, ..Config::full() };
            let kl = self.drift(reference, &config, &mut run.clone())?.0.mean_kl();
            ranking.curve.insert(cells, kl);
            Ok(kl)
        })
    }

    /// Returns the ranking of a configuration: a known one, or a new one with the measurements of an earlier run.
    fn ranking<'a>(&self, config: &Config, run: &Run, steps: usize, known: &'a mut Vec<Ranking>) -> &'a mut Ranking {
        let (name, seed) = (config.ranking_name(), run.seed);
        let at = known.iter().position(|r| r.name == name && r.seed == seed).unwrap_or(known.len());
        if at == known.len() {
            let request =
                |run: &Run| (run.model.clone(), run.cache_type.clone(), run.item.clone(), run.seed, run.blind);
            let earlier = self.records().iter().filter_map(|record| match record {
                Record::Adaptivity(r) => Some(r),
                _ => None,
            });
            let earlier = earlier.filter(|r| r.ranking == name && r.steps == steps && request(&r.run) == request(run));
            let mut curve: BTreeMap<_, _> =
                earlier.flat_map(|r| &r.curve).map(|&(cells, kl)| (cells, f64::from(kl))).collect();
            curve.insert(run.tokens, 0.0);
            known.push(Ranking { name, seed, params: config.ranking(), account_error: config.account_error, curve });
        }
        &mut known[at]
    }
}
