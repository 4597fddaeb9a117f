//! Tests that need access to llama.cpp's graph: they compare with naive float64 on the real model.

mod after;
mod baselines;
mod borders;
mod busy;
mod device;
pub(crate) mod fixture;
pub(crate) mod heap;
mod identity;
mod masked;
mod paper;
mod probe;
mod recurrent;
mod scorer;
mod shapes;
mod sizes;
mod subset;
pub(crate) mod tiny;
mod unsafe_code;
