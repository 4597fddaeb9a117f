//! RPC server: offers this machine's devices to remote clients.

use std::ffi::CString;
use std::io::Read;
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::{RpcError, function};
use crate::llama::{Device, device, devices, log};
use crate::sys;

/// Time for llama.cpp's server to start and to answer the first connection.
const START_TIME: Duration = Duration::from_secs(10);
const POLL_TIME: Duration = Duration::from_millis(10);

/// Settings of the server; names as in llama.cpp's `rpc-server`.
#[derive(Clone, Debug)]
pub struct ServerParams {
    /// The address to listen on (`-H`). Unauthenticated: anyone who connects can run code in this process.
    pub host: Ipv4Addr,
    /// The port (`-p`); 0 chooses a free one.
    pub port: u16,
    /// Names of devices (`-d`); empty: the accelerators, or the CPU if there are none.
    pub devices: Vec<String>,
    /// Threads of the CPU device (`-t`).
    pub n_threads: usize,
    /// A folder that caches large tensors (`-c`), so that clients need not send them again.
    pub cache: Option<PathBuf>,
}

/// A server that is ready to run.
pub struct Server {
    address: SocketAddrV4,
    devices: Vec<Device>,
    n_threads: usize,
    cache: Option<CString>,
}

impl Server {
    /// Finds the devices, and a free port if none is given.
    ///
    /// # Errors
    /// [`RpcError::NotBuilt`], [`RpcError::Device`], [`RpcError::Listen`], [`RpcError::CachePath`].
    pub fn new(params: &ServerParams) -> Result<Self, RpcError> {
        function(START_SERVER)?;
        let cache = params.cache.as_ref().map(|path| CString::new(path.as_os_str().as_encoded_bytes()));
        let cache = cache.transpose().map_err(|_| RpcError::CachePath)?;
        let devices = chosen(&params.devices)?;
        // llama.cpp's server reports neither the port that it took nor the reason why it cannot have one.
        let wanted = SocketAddrV4::new(params.host, params.port);
        let found = TcpListener::bind(wanted).and_then(|listener| listener.local_addr());
        let found = found.map_err(|error| RpcError::Listen { address: wanted.into(), error })?;
        let address = SocketAddrV4::new(params.host, found.port());
        Ok(Self { address, devices, n_threads: params.n_threads, cache })
    }

    /// Returns the address that the server will listen on.
    pub fn address(&self) -> SocketAddrV4 {
        self.address
    }

    /// Returns the devices offered to clients.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// Serves clients one after another, indefinitely. `ready` is called from another thread once clients can connect.
    ///
    /// # Errors
    /// [`RpcError::Ended`] if llama.cpp's server stops; the function returns only in that case, or with an error from
    /// before the start.
    pub fn run(&self, ready: impl FnOnce() + Send + 'static) -> RpcError {
        let start_server = match function(START_SERVER) {
            Ok(function) => function,
            Err(error) => return error,
        };
        let Ok(endpoint) = CString::new(self.address.to_string()) else {
            return RpcError::Endpoint(self.address.to_string());
        };
        let mut handles: Vec<_> = self.devices.iter().filter_map(|device| device::find(&device.name)).collect();
        let cache = self.cache.as_ref().map_or(std::ptr::null(), |path| path.as_ptr());
        let address = self.address;
        thread::spawn(move || {
            if is_serving(address) {
                ready();
            }
        });
        log::clear_reason();
        // SAFETY: the function with that name has this type; strings and devices outlive the call.
        unsafe {
            let n = handles.len();
            sys::gvote_shim_rpc_serve(start_server, endpoint.as_ptr(), cache, self.n_threads, n, handles.as_mut_ptr());
        }
        RpcError::Ended(log::take_reason())
    }
}

const START_SERVER: &std::ffi::CStr = c"ggml_backend_rpc_start_server";

/// Returns the named devices, or the default devices of llama.cpp's server.
fn chosen(names: &[String]) -> Result<Vec<Device>, RpcError> {
    let all = devices();
    if names.is_empty() {
        let gpus: Vec<_> = all.iter().filter(|device| device.is_gpu).cloned().collect();
        return Ok(if gpus.is_empty() {
            all.into_iter().filter(|device| device.name == "CPU").collect()
        } else {
            gpus
        });
    }
    let one = |name: &String| {
        all.iter().find(|device| device.name.eq_ignore_ascii_case(name)).cloned().ok_or_else(|| RpcError::Device {
            name: name.clone(),
            known: all.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(", "),
        })
    };
    names.iter().map(one).collect()
}

/// Waits until the server accepts a connection and closes it: the server handles one at a time, and logs each.
fn is_serving(address: SocketAddrV4) -> bool {
    let host = if address.ip().is_unspecified() { Ipv4Addr::LOCALHOST } else { *address.ip() };
    let address = SocketAddrV4::new(host, address.port()).into();
    let start = Instant::now();
    while start.elapsed() < START_TIME {
        if let Ok(mut connection) = TcpStream::connect_timeout(&address, START_TIME) {
            let _ = connection.shutdown(Shutdown::Write);
            let _ = connection.set_read_timeout(Some(START_TIME));
            let _ = connection.read(&mut [0]);
            return true;
        }
        thread::sleep(POLL_TIME);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(port: u16) -> ServerParams {
        ServerParams { host: Ipv4Addr::LOCALHOST, port, devices: Vec::new(), n_threads: 1, cache: None }
    }

    #[test]
    fn a_port_is_found_where_none_is_named() {
        let server = Server::new(&params(0)).unwrap();
        assert!(server.address().port() > 0);
        assert!(!server.devices().is_empty());
    }

    #[test]
    fn a_port_in_use_is_an_error_before_anything_is_served() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = Server::new(&params(port)).err().unwrap().to_string();
        assert!(error.contains(&format!("127.0.0.1:{port}")) && error.contains("`port`"), "{error}");
    }

    #[test]
    fn a_device_that_is_not_there_is_refused_with_those_that_are() {
        let params = ServerParams { devices: vec!["cpu".into(), "TPU7".into()], ..params(0) };
        let error = Server::new(&params).err().unwrap().to_string();
        assert!(error.contains("\"TPU7\"") && error.contains("CPU"), "{error}");
    }
}
