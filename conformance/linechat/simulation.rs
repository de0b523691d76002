//! A simulated network. In unit tests it stands in the place of `mod os`: the same sockets, poller,
//! clock and signals, but in one thread's memory, with a clock of its own. Everything that chance
//! decides here follows from the seed given to `begin`, so that every run can be repeated.
//!
//! The server's side is what server.rs knows of an operating system: `Listener`, `Socket`, `Poller`,
//! `Signals` and `now`. The other side, for tests, is `Peer`: one end of one connection.
//!
//! - Time passes only in `Poller::wait`, which goes to the next event at once, and by the cost that
//!   `Conditions` give to system calls.
//! - A read or a write may take any part of what it could take, a write also nothing.
//! - A byte from the server to a peer waits in the server's kernel until the peer's receive window
//!   has room (`Buffers`), and then in that window until the peer takes it. What a peer has taken
//!   makes room in its window only in steps, as it does with Linux' large receive buffers.
//! - A failed connection behaves as Linux' tcp(7): what had been received before can still be read,
//!   then there is an error, once, and then the end; writing fails. Closing with unread input resets
//!   the connection, and what the other end has not taken by then is lost.

#[path = "chance.rs"]
pub mod chance;

use super::{Interest, Readiness};
use chance::Chance;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// What holds for the whole network.
#[derive(Clone, Copy, Debug, Default)]
pub struct Conditions {
    /// Of a hundred reads, writes and waits, how many take only a part of what they could.
    pub partial: usize,
    /// Time that one system call takes, and each KiB that it moves.
    pub call_cost: Duration,
    pub kib_cost: Duration,
}

/// Sizes of one connection's buffers, in bytes, each at least 1.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    /// What the server's kernel holds of what the peer has sent.
    pub receive: usize,
    /// What the server's kernel holds while the window is closed; the poller reports that a socket
    /// can be written to when less than half of it is used (tcp(7), TCP_NOTSENT_LOWAT).
    pub unsent: usize,
    /// The peer's receive window.
    pub window: usize,
    /// The window opens in steps of this. At most half the window.
    pub step: usize,
    /// The peer takes everything at once and forgets it.
    pub discards: bool,
}

impl Default for Buffers {
    fn default() -> Self {
        Buffers {
            receive: 128 * 1024,
            unsent: 16 * 1024,
            window: 64 * 1024,
            step: 1,
            discards: false,
        }
    }
}

impl Buffers {
    /// Every write is taken as a whole, whatever the network's conditions.
    pub const UNLIMITED: Buffers = Buffers {
        receive: 128 * 1024,
        unsent: 1,
        window: usize::MAX / 2,
        step: 1,
        discards: false,
    };
    pub const DISCARDING: Buffers = Buffers { discards: true, ..Buffers::UNLIMITED };
}

/// The users of the connections' other ends, which act while the server waits.
pub trait Peers {
    /// The time of the next action, since the beginning of the network.
    fn next(&self) -> Option<Duration>;
    /// Carries out the actions whose time has come.
    fn act(&mut self);
}

/// How many system calls the server has made, and how many bytes they moved.
#[derive(Clone, Copy, Debug, Default)]
pub struct Calls {
    pub count: usize,
    pub bytes: usize,
}

thread_local! {
    static NETWORK: RefCell<Network> = RefCell::new(Network::new(1, Conditions::default()));
    static PEERS: RefCell<Option<Rc<RefCell<dyn Peers>>>> = const { RefCell::new(None) };
}

fn with<T>(action: impl FnOnce(&mut Network) -> T) -> T {
    NETWORK.with_borrow_mut(action)
}

/// Makes a new network for this thread, and returns what a server is made with.
pub fn begin(seed: u64, conditions: Conditions) -> (Listener, Signals) {
    PEERS.set(None);
    NETWORK.set(Network::new(seed, conditions));
    (Listener(()), Signals(()))
}

/// From now on these act while the server waits.
pub fn set_peers(peers: Rc<RefCell<dyn Peers>>) {
    PEERS.set(Some(peers));
}

/// The time since the beginning of the network.
pub fn time() -> Duration {
    with(|network| network.time)
}

/// The server's clock.
pub fn now() -> Instant {
    with(|network| network.beginning + network.time)
}

/// `Poller::wait` returns at this time, if not before: for tests that then do something themselves.
pub fn set_alarm(time: Option<Duration>) {
    with(|network| network.alarm = time);
}

/// The server's process is suspended for this long.
pub fn suspend(time: Duration) {
    with(|network| network.time += time);
}

/// The next wait that finds no source ready does this before it returns.
pub fn after_wait(action: impl FnOnce() + 'static) {
    with(|network| network.after_wait = Some(Box::new(action)));
}

/// Sends the server a signal.
pub fn signal() {
    with(|network| {
        network.is_signalled = true;
        network.has_changed(SIGNALS);
    });
}

/// The next calls of `Listener::accept` fail, for these reasons.
pub fn fail_accept(reasons: &[ErrorKind]) {
    with(|network| network.failing_accepts.extend(reasons));
}

pub fn calls() -> Calls {
    with(|network| network.calls)
}

/// How many sockets the server holds.
pub fn descriptors() -> usize {
    with(|network| network.descriptors)
}

/// Peers that the server has written to, read from or ended since the last call, in any order.
pub fn touched() -> Vec<Peer> {
    with(|network| {
        let touched = mem::take(&mut network.touched);
        touched.iter().for_each(|&at| network.connections[at].is_touched = false);
        touched.into_iter().map(Peer).collect()
    })
}

/// What the server has done that would be wrong with a real operating system.
pub fn misuse() -> Vec<String> {
    with(|network| mem::take(&mut network.misuse))
}

struct Network {
    chance: Chance,
    conditions: Conditions,
    beginning: Instant,
    time: Duration,
    alarm: Option<Duration>,
    connections: Vec<Connection>,
    /// Connections that the server has not accepted yet.
    arriving: VecDeque<(usize, SocketAddr)>,
    failing_accepts: VecDeque<ErrorKind>,
    is_signalled: bool,
    after_wait: Option<Box<dyn FnOnce()>>,
    /// The poller's knowledge of the listener, the signals, and then each connection.
    sources: Vec<Source>,
    /// Numbers of sources that may be ready.
    changed: Vec<usize>,
    touched: Vec<usize>,
    descriptors: usize,
    calls: Calls,
    misuse: Vec<String>,
}

/// Numbers of sources.
const LISTENER: usize = 0;
const SIGNALS: usize = 1;
const FIRST_CONNECTION: usize = 2;

#[derive(Clone, Copy, Default)]
struct Source {
    watched: Option<(usize, Interest)>,
    has_changed: bool,
}

impl Network {
    fn new(seed: u64, conditions: Conditions) -> Self {
        Network {
            chance: Chance(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1),
            conditions,
            beginning: Instant::now(),
            time: Duration::ZERO,
            alarm: None,
            connections: Vec::new(),
            arriving: VecDeque::new(),
            failing_accepts: VecDeque::new(),
            is_signalled: false,
            after_wait: None,
            sources: vec![Source::default(); FIRST_CONNECTION],
            changed: Vec::new(),
            touched: Vec::new(),
            descriptors: 0,
            calls: Calls::default(),
            misuse: Vec::new(),
        }
    }

    /// A system call that moves so many bytes takes its time.
    fn charge(&mut self, bytes: usize) {
        self.calls.count += 1;
        self.calls.bytes += bytes;
        let Conditions { call_cost, kib_cost, .. } = self.conditions;
        self.time += call_cost + kib_cost * bytes as u32 / 1024;
    }

    /// How much a call takes of what it could take.
    fn part(&mut self, whole: usize) -> usize {
        match self.chance.below(100) < self.conditions.partial {
            true => self.chance.below(whole + 1),
            false => whole,
        }
    }

    /// A source's readiness may have changed.
    fn has_changed(&mut self, number: usize) {
        let source = &mut self.sources[number];
        if !mem::replace(&mut source.has_changed, true) {
            self.changed.push(number);
        }
    }

    /// The server has done something that the peer can see.
    fn touch(&mut self, at: usize) {
        self.has_changed(FIRST_CONNECTION + at);
        if !mem::replace(&mut self.connections[at].is_touched, true) {
            self.touched.push(at);
        }
    }

    /// Whether a source can be read, can be written, and has failed.
    fn readiness(&self, number: usize) -> (bool, bool, bool) {
        match number {
            LISTENER => (!self.arriving.is_empty(), false, false),
            SIGNALS => (self.is_signalled, false, false),
            _ => self.connections[number - FIRST_CONNECTION].readiness(),
        }
    }

    /// Reports ready sources, beginning anywhere; of many sometimes only some, as epoll_wait(2) does
    /// when there are more than it was given room for.
    fn report(&mut self, ready: &mut Vec<Readiness>) {
        let mut changed = mem::take(&mut self.changed);
        changed.retain(|&number| {
            let (can_read, can_write, failed) = self.readiness(number);
            let Some((token, interest)) = self.sources[number].watched else {
                self.sources[number].has_changed = false;
                return false;
            };
            let readable = failed || (can_read && interest.read);
            let writable = failed || (can_write && interest.write);
            self.sources[number].has_changed = readable || writable;
            if readable || writable {
                ready.push(Readiness { token, readable, writable, failed });
            }
            readable || writable
        });
        self.changed = changed;
        if ready.len() > 1 {
            let first = self.chance.below(ready.len());
            ready.rotate_left(first);
            let reported = self.part(ready.len()).max(1);
            ready.truncate(reported);
        }
    }
}

/// One connection, with what is on its way in both directions.
#[derive(Default)]
struct Connection {
    buffers: Buffers,
    is_touched: bool,
    /// Sent by the peer and not read by the server; the first `arrived` bytes are in its kernel.
    sent: VecDeque<u8>,
    arrived: usize,
    /// How many bytes have ever arrived at the server.
    all_arrived: usize,
    peer_has_ended: bool,
    peer_has_closed: bool,
    /// Written by the server and not taken by the peer; the last `unsent` bytes are in the server's
    /// kernel, the others in the peer's.
    written: VecDeque<u8>,
    unsent: usize,
    /// How much of the window is used as far as the server's kernel knows, and how much of that the
    /// peer has freed without announcing it.
    used: usize,
    freed: usize,
    /// How many bytes the server's kernel has taken, and when it took the last ones.
    all_written: usize,
    last_written: Duration,
    server_has_ended: bool,
    server_has_closed: bool,
    /// There is no connection any more, and the error that the server is to be told once.
    has_failed: bool,
    failure: Option<ErrorKind>,
    /// The peer has been told that there is no connection any more.
    was_reset: bool,
}

impl Connection {
    fn readiness(&self) -> (bool, bool, bool) {
        let failed = self.has_failed || (self.input_has_ended() && self.server_has_ended);
        let readable = failed || self.arrived > 0 || self.input_has_ended();
        (readable, failed || 2 * self.unsent < self.buffers.unsent, failed)
    }

    fn input_has_ended(&self) -> bool {
        self.peer_has_ended && self.arrived == self.sent.len()
    }

    /// What the peer has sent goes on to the server's kernel while that has room.
    fn arrive(&mut self) {
        let arrived = self.sent.len().min(self.buffers.receive);
        self.all_arrived += arrived - self.arrived;
        self.arrived = arrived;
    }

    /// What the server has written goes on to the peer while the window has room.
    fn depart(&mut self) {
        let length = self.unsent.min(self.buffers.window - self.used);
        self.unsent -= length;
        self.used += length;
    }

    /// The connection fails; the server learns it as `kind`.
    fn fail(&mut self, kind: ErrorKind) {
        if !mem::replace(&mut self.has_failed, true) {
            self.failure = Some(kind);
            self.sent.truncate(self.arrived);
            self.written = VecDeque::new();
            self.unsent = 0;
        }
    }

    /// The server's end resets the connection: what the peer has not taken is lost.
    fn reset_peer(&mut self) {
        self.has_failed = true;
        self.was_reset = true;
        self.sent = VecDeque::new();
        self.arrived = 0;
        self.written = VecDeque::new();
        self.unsent = 0;
    }

    fn read(&mut self, buffer: &mut [u8]) -> usize {
        let length = buffer.len().min(self.arrived);
        self.sent.read_exact(&mut buffer[..length]).expect("bytes that are there");
        self.arrived -= length;
        self.arrive();
        length
    }
}

// The server's side

pub struct Listener(());

impl Listener {
    pub fn accept(&self) -> io::Result<(Socket, SocketAddr)> {
        with(|network| {
            network.charge(0);
            if let Some(reason) = network.failing_accepts.pop_front() {
                return Err(reason.into());
            }
            let (at, address) = network.arriving.pop_front().ok_or(ErrorKind::WouldBlock)?;
            network.descriptors += 1;
            network.has_changed(LISTENER);
            network.touch(at);
            Ok((Socket(at), address))
        })
    }
}

pub struct Socket(usize);

pub fn set_socket_options(_: &Socket) {}

impl Socket {
    pub fn peer(&self) -> Peer {
        Peer(self.0)
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
            let connection = &mut network.connections[self.0];
            if connection.has_failed {
                return Err(ErrorKind::NotConnected.into());
            }
            match how {
                Shutdown::Write => connection.server_has_ended = true,
                _ => network.misuse.push(format!("shutdown({how:?}) is not simulated")),
            }
            network.touch(self.0);
            Ok(())
        })
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        with(|network| {
            if buffer.is_empty() {
                network.misuse.push("a read into no room looks like the end of input".to_owned());
            }
            let whole = buffer.len().min(network.connections[self.0].arrived);
            let length = network.part(whole).max(whole.min(1));
            network.charge(length);
            network.touch(self.0);
            let connection = &mut network.connections[self.0];
            if length > 0 {
                return Ok(connection.read(&mut buffer[..length]));
            }
            match connection.failure.take() {
                Some(failure) => Err(failure.into()),
                None if connection.has_failed || connection.input_has_ended() => Ok(0),
                None => Err(ErrorKind::WouldBlock.into()),
            }
        })
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        with(|network| {
            let connection = &mut network.connections[self.0];
            if let Some(failure) = connection.failure.take() {
                return Err(failure.into());
            }
            if connection.has_failed || connection.server_has_ended {
                return Err(ErrorKind::BrokenPipe.into());
            }
            let Buffers { window, unsent, .. } = connection.buffers;
            let room = window - connection.used + unsent - connection.unsent;
            let all = bytes.len();
            // A fresh connection takes a short line as a whole, as real ones do.
            let is_first = connection.all_written == 0 && all < 100;
            let length = match is_first || window == Buffers::UNLIMITED.window {
                true => all.min(room),
                false => network.part(all.min(room)),
            };
            network.charge(length);
            network.touch(self.0);
            if length == 0 && all > 0 {
                return Err(ErrorKind::WouldBlock.into());
            }
            let time = network.time;
            let connection = &mut network.connections[self.0];
            connection.all_written += length;
            connection.last_written = time;
            if !connection.buffers.discards {
                connection.written.extend(&bytes[..length]);
                connection.unsent += length;
                connection.depart();
            }
            if connection.peer_has_closed {
                connection.fail(ErrorKind::ConnectionReset);
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
            // A server that outlives its network, after a failed test.
            let Some(connection) = network.connections.get_mut(self.0) else {
                return;
            };
            connection.server_has_closed = true;
            if !connection.sent.is_empty() {
                connection.reset_peer();
            }
            network.calls.count += 1;
            network.descriptors -= 1;
            if network.sources[FIRST_CONNECTION + self.0].watched.take().is_some() {
                network.misuse.push("a socket is closed that the poller still watches".to_owned());
            }
            network.touch(self.0);
        });
    }
}

pub struct Signals(());

pub fn was_signalled(_: &mut Signals) -> bool {
    with(|network| mem::take(&mut network.is_signalled))
}

/// What the poller can watch.
pub trait Pollable {
    fn number(&self) -> usize;
}

impl Pollable for Listener {
    fn number(&self) -> usize {
        LISTENER
    }
}

impl Pollable for Signals {
    fn number(&self) -> usize {
        SIGNALS
    }
}

impl Pollable for Socket {
    fn number(&self) -> usize {
        FIRST_CONNECTION + self.0
    }
}

/// Has the poller watch a source from now on, or not any more. Fails unless it did, or did not.
fn watch(number: usize, did: bool, watched: Option<(usize, Interest)>) -> io::Result<()> {
    with(|network| {
        network.charge(0);
        let source = &mut network.sources[number];
        if source.watched.is_some() != did {
            return Err(ErrorKind::NotFound.into());
        }
        source.watched = watched;
        network.has_changed(number);
        Ok(())
    })
}

pub struct Poller(());

impl Poller {
    pub fn new() -> io::Result<Self> {
        Ok(Poller(()))
    }

    pub fn add(&mut self, it: &impl Pollable, token: usize, interest: Interest) -> io::Result<()> {
        watch(it.number(), false, Some((token, interest)))
    }

    pub fn modify(&mut self, it: &impl Pollable, token: usize, new: Interest) -> io::Result<()> {
        watch(it.number(), true, Some((token, new)))
    }

    pub fn delete(&mut self, it: &impl Pollable, _token: usize) -> io::Result<()> {
        watch(it.number(), true, None)
    }

    /// Waits until something is ready, the time is over, or the test's alarm; `Peers` act meanwhile.
    pub fn wait(&mut self, ready: &mut Vec<Readiness>, limit: Option<Duration>) -> io::Result<()> {
        ready.clear();
        with(|network| network.charge(0));
        let milliseconds = limit.map(|limit| limit.as_nanos().div_ceil(1_000_000) as u64);
        let deadline = milliseconds.map(|limit| time() + Duration::from_millis(limit));
        let peers = PEERS.with_borrow(Option::clone);
        loop {
            let next = peers.as_ref().and_then(|peers| {
                let mut peers = peers.borrow_mut();
                peers.act();
                peers.next()
            });
            with(|network| network.report(ready));
            let (now, alarm) = with(|network| (network.time, network.alarm));
            let is_past = |time: Option<Duration>| time.is_some_and(|time| time <= now);
            if !ready.is_empty() {
                return Ok(());
            }
            if is_past(deadline) || is_past(alarm) {
                with(|network| network.after_wait.take()).into_iter().for_each(|action| action());
                return Ok(());
            }
            let until = [deadline, alarm, next].into_iter().flatten().min();
            let until = until.expect("the server waits for ever, and no peer acts");
            with(|network| network.time = network.time.max(until));
        }
    }
}

// The peers' side

/// The other end of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer(usize);

impl Peer {
    pub fn connect(address: SocketAddr, buffers: Buffers) -> Peer {
        with(|network| {
            let at = network.connections.len();
            network.sources.push(Source::default());
            network.connections.push(Connection { buffers, ..Connection::default() });
            network.arriving.push_back((at, address));
            network.has_changed(LISTENER);
            Peer(at)
        })
    }

    /// A number for each peer, from 0.
    pub fn number(self) -> usize {
        self.0
    }

    fn with<T>(self, action: impl FnOnce(&mut Connection) -> T) -> T {
        with(|network| {
            network.has_changed(FIRST_CONNECTION + self.0);
            action(&mut network.connections[self.0])
        })
    }

    fn look<T>(self, action: impl FnOnce(&Connection) -> T) -> T {
        with(|network| action(&network.connections[self.0]))
    }

    /// Sends bytes; what the server's kernel has no room for waits in the peer's.
    pub fn send(self, bytes: &[u8]) {
        self.with(|connection| {
            if connection.server_has_closed {
                connection.reset_peer();
            } else if !connection.has_failed {
                connection.sent.extend(bytes);
                connection.arrive();
            }
        });
    }

    /// Takes up to `most` bytes of what has come, and of what comes when that makes room in the
    /// window. Returns how many.
    pub fn take(self, most: usize, into: &mut Vec<u8>) -> usize {
        self.with(|connection| {
            let before = into.len();
            loop {
                let left = most - (into.len() - before);
                let length = left.min(connection.written.len() - connection.unsent);
                if length == 0 {
                    return most - left;
                }
                let written = (&mut connection.written).take(length as u64);
                { written }.read_to_end(into).expect("bytes that are there");
                connection.freed += length;
                if connection.freed >= connection.buffers.step {
                    connection.used -= mem::take(&mut connection.freed);
                    connection.depart();
                }
            }
        })
    }

    /// Whether the server has ended its side of the stream, and all that came before is taken.
    pub fn sees_end(self) -> bool {
        self.look(|it| {
            !it.has_failed && it.written.is_empty() && (it.server_has_ended || it.server_has_closed)
        })
    }

    /// Whether the server has reset the connection.
    pub fn was_reset(self) -> bool {
        self.look(|connection| connection.was_reset)
    }

    /// Whether the server's end of the connection is closed.
    pub fn is_dropped(self) -> bool {
        self.look(|connection| connection.server_has_closed)
    }

    /// How many of the bytes sent the server has not read yet.
    pub fn unread(self) -> usize {
        self.look(|connection| connection.sent.len())
    }

    /// How many bytes have ever come as far as the server's kernel.
    pub fn all_arrived(self) -> usize {
        self.look(|connection| connection.all_arrived)
    }

    /// How many bytes the server's kernel has ever taken for this peer, and when the last.
    pub fn all_written(self) -> (usize, Duration) {
        self.look(|connection| (connection.all_written, connection.last_written))
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
                connection.fail(ErrorKind::ConnectionReset);
            }
        });
    }

    pub fn reset(self) {
        self.with(|connection| connection.fail(ErrorKind::ConnectionReset));
    }

    /// The peer has vanished, and the server's kernel gives up (tcp(7), TCP_USER_TIMEOUT).
    pub fn time_out(self) {
        self.with(|connection| connection.fail(ErrorKind::TimedOut));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
