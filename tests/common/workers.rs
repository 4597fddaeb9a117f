//! Workers on loopback, and measurement of the traffic with them.
#![allow(dead_code)] // each test program uses only a part of it

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::cli::{Done, bare};

/// No step of these tests takes this long, even on a busy machine.
const LIMIT: Duration = Duration::from_secs(240);

/// A `gvote rpc-server` on a free port; killed when dropped.
pub struct Worker {
    pub endpoint: String,
    child: Child,
    log: mpsc::Receiver<String>,
}

impl Worker {
    pub fn start() -> Self {
        Self::start_with(&["-t", "1"])
    }

    pub fn start_with(args: &[&str]) -> Self {
        let mut program = bare(&[&["rpc-server", "-p", "0"], args].concat());
        // makes the worker log a line for each graph
        let mut child = program.env("GGML_RPC_DEBUG", "1").env("OMP_WAIT_POLICY", "passive").spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let endpoint = lines.find_map(|line| Some(line.unwrap().strip_prefix("endpoint")?.trim().to_owned()));
        let log = lines_of(child.stderr.take().unwrap());
        let endpoint = endpoint.unwrap_or_else(|| panic!("{:?}", log.iter().collect::<Vec<_>>()));
        Self { endpoint, child, log }
    }

    /// Waits until the worker has received `n` more graphs to compute.
    pub fn wait_for_graphs(&self, n: usize) {
        (0..n).for_each(|_| self.wait_for("[graph_compute]"));
    }

    /// Waits for a line of the worker's log.
    pub fn wait_for(&self, text: &str) {
        let deadline = Instant::now() + LIMIT;
        while !self.log.recv_timeout(deadline - Instant::now()).unwrap().contains(text) {}
    }

    /// Kills the worker as `kill -9` does.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Stops the worker as Ctrl-C does.
    pub fn interrupt(mut self) -> (i32, String) {
        let sent = Command::new("kill").args(["-INT", &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let status = wait(&mut self.child).code().expect("it exits by itself");
        (status, self.log.iter().collect::<Vec<_>>().join("\n"))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines_of(pipe: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    lines
}

fn wait(child: &mut Child) -> std::process::ExitStatus {
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    panic!("it hangs");
}

/// Returns the result of a running program if it ends in time; reads its pipes meanwhile.
pub fn finish_in_time(mut child: Child) -> Done {
    let read = |mut pipe: Box<dyn Read + Send>| {
        thread::spawn(move || {
            let mut text = String::new();
            pipe.read_to_string(&mut text).unwrap();
            text
        })
    };
    let stdout = read(Box::new(child.stdout.take().unwrap()));
    let stderr = read(Box::new(child.stderr.take().unwrap()));
    let status = wait(&mut child).code().expect("no signal ended the program");
    Done { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// Commands of llama.cpp's RPC, as numbered in ggml-rpc.cpp.
mod command {
    pub const SET_TENSOR: u8 = 6;
    pub const GET_TENSOR: u8 = 8;
    pub const GRAPH_COMPUTE: u8 = 10;
}

/// Layout of a tensor in a message: its size in bytes, and the offsets of its buffer and name.
const TENSOR: usize = 296;
const BUFFER: usize = 12;
const NAME: std::ops::Range<usize> = 228..292;

/// Bytes of a buffer's contents that were transferred, without the message header.
#[derive(Clone, Copy)]
struct Transfer {
    buffer: u64,
    to_worker: bool,
    bytes: u64,
}

#[derive(Default)]
struct Seen {
    to_worker: u64,
    from_worker: u64,
    graphs: u64,
    transfers: Vec<Transfer>,
    /// Buffers that hold K and V.
    cache: HashSet<u64>,
}

/// Traffic between a client and a worker.
#[derive(Clone, Copy, Debug)]
pub struct Traffic {
    /// All bytes.
    pub to_worker: u64,
    pub from_worker: u64,
    /// Bytes of K and V among them.
    pub kv_to_worker: u64,
    pub kv_from_worker: u64,
    /// Graphs sent in full.
    pub graphs: u64,
}

/// A proxy before a worker that counts the traffic.
pub struct Proxy {
    pub endpoint: String,
    seen: Arc<Mutex<Seen>>,
}

impl Proxy {
    pub fn before(worker: &Worker) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (worker, counted) = (worker.endpoint.clone(), seen.clone());
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let worker = TcpStream::connect(&worker).unwrap();
                client.set_nodelay(true).unwrap();
                worker.set_nodelay(true).unwrap();
                let (answers, to_client, back) =
                    (worker.try_clone().unwrap(), client.try_clone().unwrap(), counted.clone());
                thread::spawn(move || pass_answers(answers, to_client, &back));
                let there = counted.clone();
                thread::spawn(move || pass_commands(client, worker, &there));
            }
        });
        Self { endpoint, seen }
    }

    /// Returns the traffic so far.
    pub fn traffic(&self) -> Traffic {
        let seen = self.seen.lock().unwrap();
        let kv = |to_worker| {
            let transfers = seen.transfers.iter().filter(|t| t.to_worker == to_worker);
            transfers.filter(|t| seen.cache.contains(&t.buffer)).map(|t| t.bytes).sum()
        };
        Traffic {
            to_worker: seen.to_worker,
            from_worker: seen.from_worker,
            kv_to_worker: kv(true),
            kv_from_worker: kv(false),
            graphs: seen.graphs,
        }
    }
}

fn pass_answers(mut worker: TcpStream, mut client: TcpStream, seen: &Mutex<Seen>) {
    let _ends = Ends([client.try_clone().unwrap(), worker.try_clone().unwrap()]);
    let mut bytes = vec![0; 1 << 16];
    while let Ok(n @ 1..) = worker.read(&mut bytes) {
        seen.lock().unwrap().from_worker += n as u64;
        if client.write_all(&bytes[..n]).is_err() {
            break;
        }
    }
}

/// Closes both sides of a connection, even when a thread panics; a peer would otherwise wait forever.
struct Ends([TcpStream; 2]);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.iter().for_each(|end| drop(end.shutdown(Shutdown::Both)));
    }
}

/// Forwards commands: a byte, the length of the body in eight bytes, and the body.
fn pass_commands(mut client: TcpStream, mut worker: TcpStream, seen: &Mutex<Seen>) {
    let _ends = Ends([client.try_clone().unwrap(), worker.try_clone().unwrap()]);
    loop {
        let mut message = vec![0; 9];
        if client.read_exact(&mut message).is_err() {
            break;
        }
        let length = number(&message, 1) as usize;
        message.resize(9 + length, 0);
        if client.read_exact(&mut message[9..]).is_err() {
            break;
        }
        note(&message, &mut seen.lock().unwrap());
        if worker.write_all(&message).is_err() {
            break;
        }
    }
}

/// Whether a tensor of this name holds K or V of a layer; tensors computed from it have a suffix in their names.
fn is_storage(name: &[u8]) -> bool {
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let layer = name.strip_prefix(b"cache_k_l").or(name.strip_prefix(b"cache_v_l"));
    layer.is_some_and(|layer| !layer.is_empty() && layer.iter().all(u8::is_ascii_digit))
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn note(message: &[u8], seen: &mut Seen) {
    seen.to_worker += message.len() as u64;
    let (kind, body) = (message[0], &message[9..]);
    // offset and size follow the tensor
    let (to_worker, bytes) = match kind {
        command::SET_TENSOR => (true, (body.len() - TENSOR - 9) as u64),
        command::GET_TENSOR => (false, number(body, TENSOR + 8)),
        command::GRAPH_COMPUTE => {
            seen.graphs += 1;
            // device (4), the count of nodes (4) and nodes (8 each), the count of tensors (4) and tensors
            let count = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().unwrap()) as usize;
            let nodes = 8 * count(4);
            let tensors = &body[12 + nodes..];
            assert_eq!(tensors.len(), TENSOR * count(8 + nodes), "graphs are sent in another form");
            for tensor in tensors.chunks_exact(TENSOR) {
                if is_storage(&tensor[NAME]) {
                    seen.cache.insert(number(tensor, BUFFER));
                }
            }
            return;
        }
        _ => return,
    };
    seen.transfers.push(Transfer { buffer: number(body, BUFFER), to_worker, bytes });
}
