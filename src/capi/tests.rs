//! What the C interface promises, seen by an app that uses llama.cpp on its own:
//! - `votes`: a vote does what a session's does, and disturbs nothing;
//! - `changes`: what an app does behind our back is noticed;
//! - `steps`: gvote is out of the way while an app writes an answer, and misses nothing that matters;
//! - `answers`: an answer is voted on once it is time to, and is the full cache's until then;
//! - `room`: more tokens than cells, read as a session reads them;
//! - `protect`: what an app names, and the template's markers where that is asked for, stay in every head;
//! - `recall`: what a vote took out of the cache comes back;
//! - `recall_file`: so it does from a file of the app's choice;
//! - `walk`: whatever an app does in whatever order, no sequence meets the cells of another;
//! - `saved`: what is known of a sequence can be saved, and only that is restored;
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
