//! A simulated network. In unit tests it stands in the place of `mod system`: the same sockets,
//! poller, clock and signals, but in one thread's memory, with a clock of its own. Everything that
//! chance decides here follows from the seed given to `begin`, so every run can be repeated.
//!
//! The server uses `Listener`, `Socket`, `Poller`, `Signals` and `now`. Tests use `Peer`, which is the
//! other end of one connection.
//!
//! - Time passes only in `Poller::wait`, which goes to the next event at once, and by the cost that
//!   `Conditions` give to system calls.
//! - Bytes from a peer arrive at once. Bytes to a peer wait as `Buffers` say.
//! - A failed connection behaves as Linux' tcp(7): what had been received before can still be read,
//!   then there is an error, once, and then the end; writing fails. Closing with unread input resets
//!   the connection, and what the other end has not taken by then is lost.

use super::{Interest, Readiness, Watch};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::time::{Duration, Instant};

/// Numbers that look random: xorshift64 (Marsaglia, "Xorshift RNGs", 2003), begun with any number
/// but 0.
pub struct Chance(pub u64);

impl Default for Chance {
    fn default() -> Self {
        Chance(1)
    }
}

impl Chance {
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// What holds for the whole network.
#[derive(Clone, Copy, Debug, Default)]
pub struct Conditions {
    /// Percentage of the reads and writes that take only a part of what they could, a write perhaps
    /// nothing.
    pub partial: usize,
    /// Time that one system call takes, and each KiB that it moves.
    pub call_cost: Duration,
    pub kib_cost: Duration,
}

/// Sizes of one connection's buffers, in bytes, each at least 1.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    /// What the server's kernel holds while the window is closed; the poller reports that a socket
    /// can be written to when less than half of it is used (tcp(7), TCP_NOTSENT_LOWAT).
    pub unsent: usize,
    /// The peer's receive window, in which bytes wait until the peer takes them.
    pub window: usize,
    /// The window opens in steps of this, as with Linux' large receive buffers. At most half the
    /// window.
    pub step: usize,
    /// The peer takes everything at once and forgets it.
    pub discards: bool,
}

impl Default for Buffers {
    fn default() -> Self {
        Buffers { unsent: 16 * 1024, window: 64 * 1024, ..Buffers::UNLIMITED }
    }
}

impl Buffers {
    /// Every write is taken as a whole, whatever the network's conditions.
    pub const UNLIMITED: Buffers =
        Buffers { unsent: 1, window: usize::MAX / 2, step: 1, discards: false };
    pub const DISCARDING: Buffers = Buffers { discards: true, ..Buffers::UNLIMITED };
}

/// The number of system calls that the server has made, and of the bytes that they moved.
#[derive(Clone, Copy, Debug, Default)]
pub struct Calls {
    pub count: usize,
    pub bytes: usize,
}

thread_local! {
    static NETWORK: RefCell<Network> = RefCell::default();
    /// The time at which every network of this thread begins.
    static BEGINNING: Instant = Instant::now();
}

pub fn with<T>(action: impl FnOnce(&mut Network) -> T) -> T {
    NETWORK.with_borrow_mut(action)
}

/// Makes a new network for this thread, and returns what a server is made with.
pub fn begin(seed: u64, conditions: Conditions) -> (Listener, Signals) {
    let chance = Chance(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    NETWORK.set(Network { chance, conditions, ..Network::default() });
    (Socket(LISTENER), Socket(SIGNALS))
}

/// The time since the beginning of the network.
pub fn time() -> Duration {
    with(|network| network.time)
}

/// The server's clock.
pub fn now() -> Instant {
    BEGINNING.with(|beginning| *beginning + time())
}

/// The server's process is suspended for this long: now, or in its next wait, which then misses
/// everything that has come.
pub fn suspend(time: Duration, in_wait: bool) {
    with(|network| match in_wait {
        true => network.suspended = Some(time),
        false => network.time += time,
    });
}

/// Sends the server a signal.
pub fn signal() {
    with(|network| {
        network.is_signalled = true;
    });
}

/// The next calls of `Listener::accept` fail, for these reasons.
pub fn fail_accept(reasons: &[ErrorKind]) {
    with(|network| network.failing_accepts.extend(reasons));
}

pub fn calls() -> Calls {
    with(|network| network.calls)
}

#[derive(Default)]
pub struct Network {
    chance: Chance,
    conditions: Conditions,
    time: Duration,
    /// `Poller::wait` waits until this time at most. If it then has nothing to report it fails, so
    /// that the server's turn ends and the test can act. Later it does not wait, and does not fail.
    pub alarm: Option<Duration>,
    /// `Some`: the next wait is suspended for this long.
    suspended: Option<Duration>,
    connections: Vec<Connection>,
    /// Connections that the server has not accepted yet.
    arriving: VecDeque<(usize, SocketAddr)>,
    failing_accepts: VecDeque<ErrorKind>,
    is_signalled: bool,
    /// The sources that the poller watches, with token and interest.
    watched: BTreeMap<Source, (usize, Interest)>,
    /// The number of sockets that the server holds.
    pub descriptors: usize,
    calls: Calls,
}

/// A source that the poller can watch: a connection's number, or one of these two.
type Source = usize;
const LISTENER: Source = usize::MAX;
const SIGNALS: Source = usize::MAX - 1;

impl Network {
    /// A system call that moves this many bytes takes its time.
    fn charge(&mut self, bytes: usize) {
        self.calls.count += 1;
        self.calls.bytes += bytes;
        let Conditions { call_cost, kib_cost, .. } = self.conditions;
        self.time += call_cost + kib_cost * bytes as u32 / 1024;
    }

    /// The part of `whole` that a call takes.
    fn some_of(&mut self, whole: usize) -> usize {
        match self.chance.below(100) < self.conditions.partial {
            true => self.chance.below(whole + 1),
            false => whole,
        }
    }

    /// The sources that are ready, of those that are watched.
    fn ready(&self) -> Vec<Readiness> {
        let mut ready = Vec::new();
        for (&source, &(token, interest)) in &self.watched {
            let (can_read, can_write, failed) = match source {
                LISTENER => (!self.arriving.is_empty(), false, false),
                SIGNALS => (self.is_signalled, false, false),
                _ => self.connections[source].readiness(),
            };
            let readable = failed || (can_read && interest.read);
            let writable = failed || (can_write && interest.write);
            if readable || writable {
                ready.push(Readiness { token, readable, writable, failed });
            }
        }
        ready
    }
}

/// One connection, with what is on its way in both directions.
#[derive(Default)]
struct Connection {
    buffers: Buffers,
    /// Sent by the peer and not read by the server.
    sent: VecDeque<u8>,
    peer_has_ended: bool,
    peer_has_closed: bool,
    /// Written by the server and not taken by the peer.
    written: VecDeque<u8>,
    /// Bytes of the window that the peer has freed without announcing it.
    freed: usize,
    /// Bytes that the server's kernel has taken.
    all_written: usize,
    server_has_ended: bool,
    server_has_closed: bool,
    /// There is no connection any longer. `owes_error`: the server has not had the error yet.
    has_failed: bool,
    owes_error: bool,
}

impl Connection {
    /// Returns three values: the socket is readable, is writable, has failed.
    fn readiness(&self) -> (bool, bool, bool) {
        assert!(!self.server_has_closed, "a socket is closed that the poller still watches");
        let failed = self.has_failed || (self.input_has_ended() && self.server_has_ended);
        let readable = failed || !self.sent.is_empty() || self.input_has_ended();
        (readable, failed || 2 * self.unsent() < self.buffers.unsent, failed)
    }

    fn input_has_ended(&self) -> bool {
        self.peer_has_ended && self.sent.is_empty()
    }

    /// Bytes that the server's kernel counts in the window and in `unsent`.
    fn occupied(&self) -> usize {
        self.written.len() + self.freed
    }

    /// Bytes at the end of `written` that are in the server's kernel.
    fn unsent(&self) -> usize {
        self.occupied().saturating_sub(self.buffers.window)
    }

    /// The peer's end resets the connection. Bytes that it has sent before can still be read.
    fn reset(&mut self) {
        if !mem::replace(&mut self.has_failed, true) {
            self.owes_error = true;
            self.written = VecDeque::new();
        }
    }

    /// The server's end resets the connection: what the peer has not taken is lost.
    fn reset_peer(&mut self) {
        self.has_failed = true;
        self.sent = VecDeque::new();
        self.written = VecDeque::new();
    }
}

// The server's side

/// A connection's socket, or what else the poller can watch.
pub struct Socket(Source);
pub type Listener = Socket;
pub type Signals = Socket;

pub fn set_socket_options(_: &Socket) {}

impl Socket {
    pub fn accept(&self) -> io::Result<(Socket, SocketAddr)> {
        with(|network| {
            network.charge(0);
            if let Some(reason) = network.failing_accepts.pop_front() {
                return Err(reason.into());
            }
            let (number, address) = network.arriving.pop_front().ok_or(ErrorKind::WouldBlock)?;
            network.descriptors += 1;
            Ok((Socket(number), address))
        })
    }

    pub fn set_nonblocking(&self, _: bool) -> io::Result<()> {
        Ok(())
    }

    pub fn set_nodelay(&self, _: bool) -> io::Result<()> {
        Ok(())
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        // As a socket for IPv6 and IPv4 has it.
        Ok(SocketAddr::from((Ipv4Addr::from([192, 0, 2, 1]).to_ipv6_mapped(), 9999)))
    }

    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        with(|network| {
            network.charge(0);
            assert_eq!(how, Shutdown::Write);
            let connection = &mut network.connections[self.0];
            connection.server_has_ended |= !connection.has_failed;
            match connection.has_failed {
                true => Err(ErrorKind::NotConnected.into()),
                false => Ok(()),
            }
        })
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        with(|network| {
            assert!(!buffer.is_empty(), "a read of no bytes looks like the end of input");
            let whole = buffer.len().min(network.connections[self.0].sent.len());
            let length = network.some_of(whole).max(whole.min(1));
            network.charge(length);
            let connection = &mut network.connections[self.0];
            if length > 0 {
                connection.sent.read_exact(&mut buffer[..length]).map(|()| length)
            } else if mem::take(&mut connection.owes_error) {
                Err(ErrorKind::ConnectionReset.into())
            } else if connection.has_failed || connection.input_has_ended() {
                Ok(0)
            } else {
                Err(ErrorKind::WouldBlock.into())
            }
        })
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        with(|network| {
            let connection = &mut network.connections[self.0];
            if mem::take(&mut connection.owes_error) {
                return Err(ErrorKind::ConnectionReset.into());
            }
            if connection.has_failed || connection.server_has_ended {
                return Err(ErrorKind::BrokenPipe.into());
            }
            let Buffers { window, unsent, .. } = connection.buffers;
            let most = bytes.len().min(window + unsent - connection.occupied());
            let takes_all = window == Buffers::UNLIMITED.window;
            let length = if takes_all { most } else { network.some_of(most) };
            network.charge(length);
            if length == 0 && !bytes.is_empty() {
                return Err(ErrorKind::WouldBlock.into());
            }
            let connection = &mut network.connections[self.0];
            connection.all_written += length;
            if !connection.buffers.discards {
                connection.written.extend(&bytes[..length]);
            }
            if connection.peer_has_closed {
                connection.reset();
            }
            Ok(length)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        with(|network| {
            // After a failed test, a server outlives its network.
            let Some(connection) = network.connections.get_mut(self.0) else { return };
            connection.server_has_closed = true;
            if !connection.sent.is_empty() {
                connection.reset_peer();
            }
            network.calls.count += 1;
            network.descriptors -= 1;
        });
    }
}

pub fn was_signalled(_: &Signals) -> bool {
    with(|network| mem::take(&mut network.is_signalled))
}

pub struct Poller(());

impl Poller {
    pub fn new() -> io::Result<Self> {
        Ok(Poller(()))
    }

    /// Fails if a source that is watched begins to be watched, or another is changed.
    pub fn watch(&mut self, it: &Socket, token: usize, watch: Watch) -> io::Result<()> {
        with(|network| {
            network.charge(0);
            if network.watched.contains_key(&it.0) == matches!(watch, Watch::Begin(_)) {
                return Err(ErrorKind::NotFound.into());
            }
            match watch {
                Watch::Begin(new) | Watch::Change(new) => {
                    network.watched.insert(it.0, (token, new))
                }
                Watch::End => network.watched.remove(&it.0),
            };
            Ok(())
        })
    }

    /// Waits until something is ready, the time limit, or the test's alarm (see `Network`).
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<Vec<Readiness>> {
        with(|network| {
            network.charge(0);
            if let Some(time) = network.suspended.take() {
                network.time += time;
                return Ok(Vec::new());
            }
            let ready = network.ready();
            let milliseconds = limit.map(|limit| limit.as_nanos().div_ceil(1_000_000) as u64);
            let deadline = milliseconds.map(|limit| network.time + Duration::from_millis(limit));
            let end = [deadline, network.alarm].into_iter().flatten().min();
            let end = end.expect("the server waits for ever, and the test does not act");
            if !ready.is_empty() || end <= network.time {
                return Ok(ready);
            }
            network.time = end;
            match Some(end) == deadline {
                true => Ok(ready),
                false => Err(ErrorKind::TimedOut.into()),
            }
        })
    }
}

// The peers' side

/// The other end of one connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct Peer(usize);

impl Peer {
    pub fn connect(address: SocketAddr, buffers: Buffers) -> Peer {
        with(|network| {
            let number = network.connections.len();
            network.connections.push(Connection { buffers, ..Connection::default() });
            network.arriving.push_back((number, address));
            Peer(number)
        })
    }

    fn with<T>(self, action: impl FnOnce(&mut Connection) -> T) -> T {
        with(|network| action(&mut network.connections[self.0]))
    }

    pub fn send(self, bytes: impl AsRef<[u8]>) {
        self.with(|connection| {
            if connection.server_has_closed {
                connection.reset_peer();
            } else if !connection.has_failed {
                connection.sent.extend(bytes.as_ref());
            }
        });
    }

    /// Takes up to `most` bytes of what has come, and of what comes when that makes space in the
    /// window. Returns their number.
    pub fn take(self, most: usize, into: &mut Vec<u8>) -> usize {
        self.with(|connection| {
            let before = into.len();
            loop {
                let left = most - (into.len() - before);
                let length = left.min(connection.written.len() - connection.unsent());
                if length == 0 {
                    return most - left;
                }
                let taken =
                    Read::by_ref(&mut connection.written).take(length as u64).read_to_end(into);
                taken.expect("bytes that are there");
                connection.freed += length;
                connection.freed %= connection.buffers.step;
            }
        })
    }

    /// Returns true if the server has ended its side of the stream and all that came before is taken.
    pub fn sees_end(self) -> bool {
        self.with(|it| {
            !it.has_failed && it.written.is_empty() && (it.server_has_ended || it.server_has_closed)
        })
    }

    /// Returns true if the server has reset the connection.
    pub fn was_reset(self) -> bool {
        self.with(|connection| connection.has_failed && connection.server_has_closed)
    }

    /// Returns true if the server's end of the connection is closed.
    pub fn is_dropped(self) -> bool {
        self.with(|connection| connection.server_has_closed)
    }

    /// Bytes sent that the server has not read.
    pub fn unread(self) -> usize {
        self.with(|connection| connection.sent.len())
    }

    /// Bytes that the server's kernel has ever taken for this peer.
    pub fn all_written(self) -> usize {
        self.with(|connection| connection.all_written)
    }

    /// shutdown(SHUT_WR).
    pub fn half_close(self) {
        self.with(|connection| connection.peer_has_ended = true);
    }

    /// close(2), which resets the connection if something is unread.
    pub fn close(self) {
        self.with(|connection| {
            if connection.written.is_empty() {
                connection.peer_has_ended = true;
                connection.peer_has_closed = true;
            } else {
                connection.reset();
            }
        });
    }

    pub fn reset(self) {
        self.with(Connection::reset);
    }
}

#[test]
fn a_reset_connection_can_be_read_to_its_end_and_then_fails_once() {
    let (listener, _signals) = begin(7, Conditions::default());
    let peer = Peer::connect(([192, 0, 2, 7], 7).into(), Buffers::default());
    peer.send(b"last words");
    let (mut socket, _) = listener.accept().unwrap();
    socket.write_all(b"unread").unwrap();
    peer.close();
    let mut buffer = [0; 100];
    assert_eq!(socket.read(&mut buffer).unwrap(), 10);
    let kinds = [(); 2].map(|()| socket.read(&mut buffer).map_err(|error| error.kind()));
    assert_eq!(kinds, [Err(ErrorKind::ConnectionReset), Ok(0)]);
    assert_eq!(socket.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    // The other way round: closing with something unread takes what the peer has not taken.
    let peer = Peer::connect(([192, 0, 2, 7], 8).into(), Buffers::default());
    peer.send(b"unread");
    let (mut socket, _) = listener.accept().unwrap();
    socket.write_all(b"last words").unwrap();
    drop(socket);
    assert_eq!((peer.was_reset(), peer.take(100, &mut Vec::new())), (true, 0));
}
