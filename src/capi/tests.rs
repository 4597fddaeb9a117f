//! Tests of the C interface, from the view of an app that uses llama.cpp itself:
//! - `votes`: a vote equals a session's, and disturbs nothing else;
//! - `changes`: changes that an app makes without gvote are noticed;
//! - `steps`: the callback is removed during an answer, and gvote misses nothing that matters;
//! - `answers`: an answer is voted on once a vote is due, and is the full cache's until then;
//! - `room`: more tokens than cells, read as a session reads them;
//! - `protect`: positions that an app names, and the template's markers if the settings say so, stay in every head;
//! - `recall`: rows that a vote removed from the cache come back;
//! - `recall_file`: rows come back from a file of the app's choice;
//! - `walk`: after random sequences of operations, no sequence sees the cells of another;
//! - `saved`: the record of a sequence can be saved, and only a valid one is restored;
//! - `abuse`: NULLs, sizes, wrong order, cancellation, several threads;
//! - `each`: the same for each function, one by one.

mod abuse;
mod answers;
pub(crate) mod app;
mod changes;
mod each;
mod protect;
mod recall;
mod recall_file;
mod room;
mod saved;
mod steps;
mod votes;
mod walk;
