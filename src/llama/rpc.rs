//! Layers on other machines, through llama.cpp's RPC back end. Its functions are looked up at run time, as in
//! llama.cpp's programs, because shared libraries built by others may lack this back end.

mod keepalive;
mod server;

use std::ffi::{CStr, CString, c_void};
use std::fmt;
use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::str::FromStr;
use std::sync::Mutex;
use std::time::Duration;

pub use server::{Server, ServerParams};

use super::log;
use crate::sys;

/// Timeout for a worker to accept a connection.
const CONNECT_TIME: Duration = Duration::from_secs(5);
/// Time for a killed worker to close its connections. The process loses them one by one: the one in use may be gone
/// while a new one is still accepted.
const END_TIME: Duration = Duration::from_secs(1);

/// Errors of workers and of the server.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    #[error("{0:?} is no worker: write host:port, such as 192.168.1.7:50052 (a name, or an IPv4 address)")]
    Endpoint(String),
    #[error("this llama.cpp was built without its RPC back end: build it with -DGGML_RPC=ON")]
    NotBuilt,
    #[error("cannot reach the worker {worker} (`rpc`): {error}; start it there with gvote rpc-server")]
    Unreachable { worker: Endpoint, error: io::Error },
    #[error("the worker {0} (`rpc`) has no devices")]
    NoDevices(Endpoint),
    #[error("lost the worker {}: it takes no connections any more; start it again and repeat the command", in_words(.0))]
    Lost(Vec<Endpoint>),
    #[error(
        "lost the connection to a worker ({}), though it can be reached{reason}; what it prints may tell why: it may have been \
         started again, be of another version, or be no worker at all",
        in_words(.workers)
    )]
    Broken { workers: Vec<Endpoint>, reason: String },
    #[error("there is no device {name:?}: there are {known}")]
    Device { name: String, known: String },
    #[error("cannot listen on {address}: {error}; name another port (`port`), or 0 for one that is free")]
    Listen { address: SocketAddr, error: io::Error },
    #[error("the path of the cache holds a NUL byte")]
    CachePath,
    #[error("llama.cpp's server has ended{0}")]
    Ended(String),
}

fn in_words(workers: &[Endpoint]) -> String {
    workers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Address of a worker: a host name or IPv4 address, and a port. llama.cpp's RPC does not support IPv6.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    host: String,
    port: u16,
}

impl FromStr for Endpoint {
    type Err = RpcError;

    fn from_str(text: &str) -> Result<Self, RpcError> {
        let is_host = |host: &str| {
            !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
        };
        let port = |port: &str| port.parse().ok().filter(|&port: &u16| port > 0);
        text.split_once(':')
            .filter(|(host, _)| is_host(host))
            .and_then(|(host, rest)| Some(Self { host: host.into(), port: port(rest)? }))
            .ok_or_else(|| RpcError::Endpoint(text.into()))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl Endpoint {
    fn connect(&self) -> io::Result<TcpStream> {
        let mut last = io::Error::other("it has no IPv4 address");
        for address in (self.host.as_str(), self.port).to_socket_addrs()?.filter(SocketAddr::is_ipv4) {
            match TcpStream::connect_timeout(&address, CONNECT_TIME) {
                Ok(connection) => return Ok(connection),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Returns true if nothing accepts connections there, or if the process is about to end. A busy worker keeps
    /// connections waiting.
    fn is_gone(&self) -> bool {
        let Ok(mut connection) = self.connect() else { return true };
        let _ = connection.set_read_timeout(Some(END_TIME));
        connection.read(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
    }
}

static WORKERS: Mutex<Vec<Endpoint>> = Mutex::new(Vec::new());

fn workers() -> Vec<Endpoint> {
    WORKERS.lock().unwrap_or_else(|e| e.into_inner()).clone()
}

/// Enables keepalive on the connections to workers. Call after a model has been loaded: its connections stay open.
pub(super) fn watch_workers() {
    let workers = workers();
    if !workers.is_empty() {
        keepalive::watch(&workers);
    }
}

/// Registers the devices of a worker (llama.cpp's `rpc-server` or `gvote rpc-server`).
///
/// Models loaded from now on place layers on these devices, with their weights and their part of the KV cache. Does
/// nothing if the worker is already registered. Call only while no other thread uses llama.cpp.
///
/// A worker serves one client at a time: this call waits while the worker serves another one.
///
/// # Errors
/// [`RpcError::NotBuilt`], [`RpcError::Unreachable`], [`RpcError::NoDevices`].
///
/// A worker that is lost later, has another version, or is not a worker at all makes ggml end the process: see
/// [`on_abort`](super::on_abort) and [`lost`].
pub fn add_worker(worker: &Endpoint) -> Result<(), RpcError> {
    let add_server = function(c"ggml_backend_rpc_add_server")?;
    if workers().contains(worker) {
        return Ok(());
    }
    worker.connect().map_err(|error| RpcError::Unreachable { worker: worker.clone(), error })?;
    log::clear_reason();
    // From now on ggml may abort, and `lost()` must know this worker.
    WORKERS.lock().unwrap_or_else(|e| e.into_inner()).push(worker.clone());
    let endpoint = CString::new(worker.to_string()).map_err(|_| RpcError::Endpoint(worker.to_string()))?;
    // SAFETY: the function with that name has this type; the string outlives the call.
    let registry = unsafe { sys::gvote_shim_rpc_add_server(add_server, endpoint.as_ptr()) };
    if registry.is_null() {
        WORKERS.lock().unwrap_or_else(|e| e.into_inner()).retain(|known| known != worker);
        return Err(RpcError::NoDevices(worker.clone()));
    }
    // SAFETY: ggml keeps the registry for the whole process.
    unsafe { sys::ggml_backend_register(registry) };
    Ok(())
}

/// Returns the error behind an abort message of ggml if a worker caused the abort. Takes some seconds if a machine does
/// not respond.
pub fn lost(message: &str) -> Option<RpcError> {
    let workers = workers();
    // Messages begin with the source file.
    if workers.is_empty() || !message.contains("ggml-rpc") {
        return None;
    }
    let lost: Vec<_> = workers.iter().filter(|worker| worker.is_gone()).cloned().collect();
    Some(match lost.is_empty() {
        true => RpcError::Broken { workers, reason: log::take_reason() },
        false => RpcError::Lost(lost),
    })
}

/// Looks up a function of the RPC back end.
fn function(name: &CStr) -> Result<*mut c_void, RpcError> {
    super::init();
    // SAFETY: both strings are constants; a back end lives for the whole process.
    unsafe {
        let registry = sys::ggml_backend_reg_by_name(c"RPC".as_ptr());
        if registry.is_null() {
            return Err(RpcError::NotBuilt);
        }
        let function = sys::ggml_backend_reg_get_proc_address(registry, name.as_ptr());
        if function.is_null() { Err(RpcError::NotBuilt) } else { Ok(function) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_host_and_a_port() {
        for text in ["127.0.0.1:50052", "worker-1.local:1", "a_b:65535"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn all_else_is_refused_by_its_name() {
        for text in ["", "host", "host:", ":50052", "host:0", "host:65536", "host:50052x", "::1:50052", "a b:1", "h:-1"]
        {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")) && error.contains("host:port"), "{error}");
        }
    }

    #[test]
    fn nobody_there_is_an_error_that_names_it() {
        // a port that was free a moment ago
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = add_worker(&address.to_string().parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains(&address.to_string()) && error.contains("gvote rpc-server"), "{error}");
        assert!(workers().is_empty());
    }

    #[test]
    fn an_abort_elsewhere_is_not_a_lost_worker() {
        assert!(lost("ggml-rpc.cpp:447: Remote RPC server crashed").is_none(), "there are no workers");
    }
}
