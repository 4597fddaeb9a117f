//! TCP keepalive for connections to workers. A machine that loses power or network sends no notice, so a client would
//! wait forever unless the system probes the connection. llama.cpp does not enable this.

use std::ffi::{c_int, c_void};
use std::fs;
use std::mem;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, ToSocketAddrs};

use super::Endpoint;

/// Seconds of silence before the first probe, seconds between probes, and unanswered probes: a lost machine is noticed
/// after 25 s.
const IDLE_S: c_int = 10;
const INTERVAL_S: c_int = 5;
const COUNT: c_int = 3;

#[cfg(target_os = "macos")]
const IDLE: c_int = libc::TCP_KEEPALIVE;
#[cfg(not(target_os = "macos"))]
const IDLE: c_int = libc::TCP_KEEPIDLE;

/// Enables keepalive on this process's connections to the workers. The system closes a connection whose peer is gone,
/// and llama.cpp then reports the closed connection.
pub fn watch(workers: &[Endpoint]) {
    let addresses = workers.iter().filter_map(|worker| (worker.host.as_str(), worker.port).to_socket_addrs().ok());
    let addresses: Vec<SocketAddr> = addresses.flatten().collect();
    // `/dev/fd` lists every open file of the process, on Linux and macOS.
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
                // SAFETY: the value has that size; a descriptor closed meanwhile only causes an error.
                unsafe { libc::setsockopt(file, level, option, (&raw const value).cast::<c_void>(), size) };
            }
        }
    }
}

/// Returns the peer address of an IPv4 connection.
fn peer(file: c_int) -> Option<SocketAddr> {
    // SAFETY: plain numbers, for which all-zero bytes are valid.
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
