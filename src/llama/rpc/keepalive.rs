//! A machine that loses its power or its network says no goodbye. Whoever waits for its answer waits for ever, unless the system
//! asks from time to time whether it is still there: llama.cpp does not turn that on.

use std::ffi::{c_int, c_void};
use std::fs;
use std::mem;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, ToSocketAddrs};

use super::Endpoint;

/// Silence before the first question, between questions, and how many may stay unanswered: noticed after 25 s.
const IDLE_S: c_int = 10;
const INTERVAL_S: c_int = 5;
const COUNT: c_int = 3;

#[cfg(target_os = "macos")]
const IDLE: c_int = libc::TCP_KEEPALIVE;
#[cfg(not(target_os = "macos"))]
const IDLE: c_int = libc::TCP_KEEPIDLE;

/// Has the system watch this process's connections to the workers. It ends one whose other side is gone, and llama.cpp finds it
/// closed.
pub fn watch(workers: &[Endpoint]) {
    let addresses = workers.iter().filter_map(|worker| (worker.host.as_str(), worker.port).to_socket_addrs().ok());
    let addresses: Vec<SocketAddr> = addresses.flatten().collect();
    // every open file of the process, on Linux and macOS
    for entry in fs::read_dir("/dev/fd").into_iter().flatten().flatten() {
        let Some(file) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if peer(file).is_some_and(|peer| addresses.contains(&peer)) {
            for (level, option, value) in [
                (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
                (libc::IPPROTO_TCP, IDLE, IDLE_S),
                (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, INTERVAL_S),
                (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, COUNT),
            ] {
                let size = mem::size_of_val(&value) as libc::socklen_t;
                // SAFETY: the value has that size; a descriptor that was closed meanwhile is an error and no more.
                unsafe { libc::setsockopt(file, level, option, (&raw const value).cast::<c_void>(), size) };
            }
        }
    }
}

/// The other side of a connection by IPv4.
fn peer(file: c_int) -> Option<SocketAddr> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut address: libc::sockaddr_in = unsafe { mem::zeroed() };
    let mut size = mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: no more than that size is written.
    let failed = unsafe { libc::getpeername(file, (&raw mut address).cast(), &raw mut size) } != 0;
    if failed || c_int::from(address.sin_family) != libc::AF_INET {
        return None;
    }
    let host = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
    Some(SocketAddrV4::new(host, u16::from_be(address.sin_port)).into())
}
