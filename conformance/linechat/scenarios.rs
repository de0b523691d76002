//! The whole server in situations that are not left to chance, for the promises of PROTOCOL.md,
//! "Closing and half-closing" and "Annex B". In those with a `Crowd`, the checks of
//! simulation_tests.rs are made too.

use super::*;

const MILLISECOND: Duration = Duration::from_millis(1);

/// What a small machine needs for a system call, and for moving bytes.
const COSTS: Conditions = Conditions {
    partial: 0,
    call_cost: Duration::from_nanos(3500),
    kib_cost: Duration::from_nanos(300),
};

const SHORT: Request = Request::Msg { length: 0 };
const LONG: Request = Request::Msg { length: 3000 };

fn flooder(request: Request) -> Behaviour {
    let (pause, has_long_name) = (MILLISECOND, true);
    Behaviour { request, pause, floods: true, has_long_name, ..Behaviour::default() }
}

/// Joins and only reads.
fn steady(rate: usize, step: usize) -> Behaviour {
    Behaviour { reading: Reading { rate, step }, ..Behaviour::default() }
}

fn deaf() -> Behaviour {
    Behaviour { reading: Reading::NEVER, ..Behaviour::default() }
}

fn newcomer() -> Behaviour {
    Behaviour { has_long_name: true, ..Behaviour::default() }
}

/// Types a short line now and then, which must be passed on within `max_delay`.
fn typist(max_delay: Duration, pause: Duration) -> Behaviour {
    Behaviour { request: Request::Any, pause, max_delay: Some(max_delay), ..Behaviour::default() }
}

/// Joins and quits, again and again.
fn restless() -> Behaviour {
    let ending = Some((Duration::from_micros(1), Ending::Quit));
    Behaviour { ending, comes_again: true, ..Behaviour::default() }
}

/// A request that says this many bytes.
fn msg(length: usize) -> String {
    format!("MSG {}\n", "x".repeat(length))
}

/// A connection on which `lines` are sent.
fn arrive(buffers: Buffers, lines: &str) -> Peer {
    let peer = Peer::connect(([10, 0, 0, 1], 1024).into(), buffers);
    peer.send(lines);
    peer
}

fn take_lines(peer: Peer) -> Vec<String> {
    take_text(peer).lines().map(str::to_owned).collect()
}

/// A server to which nobody is connected.
fn server() -> Simulation {
    Simulation::new(1, Conditions::default(), options())
}

/// A server with the observer and these people.
fn crowd(behaviours: impl IntoIterator<Item = Behaviour>) -> Simulation {
    let mut sim = Simulation::new(1, COSTS, options()).observed();
    sim.add_all(behaviours);
    sim
}

impl Simulation {
    fn add_all(&mut self, behaviours: impl IntoIterator<Item = Behaviour>) {
        behaviours.into_iter().for_each(|behaviour| _ = self.crowd.add(behaviour));
    }

    /// Runs until the budget applies.
    fn run_until_limited(&mut self) {
        while !self.is_limited() {
            self.run(10 * MILLISECOND);
            assert!(os::time() < seconds(20), "nobody is ever over the soft limit");
        }
    }

    /// Runs while the budget applies, and is kept. Returns how many bytes were said.
    fn run_limited(&mut self, time: Duration) -> usize {
        let (since, first) = (os::time(), self.crowd.past.history.text.len());
        let (mut cost, mut counted) = (0, first);
        while os::time() < since + time {
            self.run(10 * MILLISECOND);
            let logged = String::from_utf8_lossy(&self.crowd.past.history.text[counted..]);
            cost += logged.lines().map(line_cost).sum::<usize>();
            counted += logged.len();
            let earned = BUDGET as f64 * (1.0 + (os::time() - since).as_secs_f64());
            assert!(cost as f64 <= earned, "{cost} bytes instead of {earned}");
            assert!(self.is_limited());
        }
        counted - first
    }

    /// The number of these people that are in the room.
    fn present(&self, ids: impl IntoIterator<Item = usize>) -> usize {
        let room = self.crowd.past.room();
        ids.into_iter().filter(|&id| room.contains(&self.crowd.past.names[id])).count()
    }

    /// A connection from one address, on which `lines` are sent.
    fn connect(&mut self, address: impl Into<IpAddr>, lines: &str) -> Peer {
        let peer = Peer::connect((address.into(), 1024).into(), Buffers::default());
        peer.send(lines);
        self.run(MILLISECOND);
        peer
    }

    /// Returns true if a new connection is greeted and not refused.
    fn greets(&mut self, address: impl Into<IpAddr>) -> bool {
        let peer = self.connect(address, "");
        take_text(peer).starts_with("HELLO ")
    }

    /// The pending output of the client in this slot.
    fn pending(&self, id: Id) -> usize {
        let Room { clients, log, .. } = &self.server.room;
        clients.get(id).expect("a client").outbox.pending(log)
    }

    /// Sends a request; returns the time until the line of the answer that begins so has come.
    fn delay(&mut self, peer: Peer, request: &str, answer: &str) -> Duration {
        let since = os::time();
        peer.send(format!("{request}\n"));
        while !take_lines(peer).iter().any(|line| line.starts_with(answer)) {
            self.turn();
            assert!(os::time() < since + seconds(20), "no answer to {request}");
        }
        os::time() - since
    }
}

/// The cost of a line for everybody while the budget applies, in bytes.
fn line_cost(line: &str) -> usize {
    match line.split(' ').collect::<Vec<_>>()[..] {
        ["JOINED", name, _] => 2 * name.len() + 43,
        ["MSG", ..] => line.len() + 2,
        _ => 0,
    }
}

// Limits

/// The peers p1 and p2; p1 takes nothing, and this many bytes are pending for it.
fn behind(bytes: usize) -> (Simulation, [Peer; 2]) {
    let mut sim = server();
    let people = [1, 2].map(|at| sim.connect([10, 0, 0, at], &format!("NAME p{at}\n")));
    loop {
        let missing = bytes - sim.pending(0);
        let length = if missing > 2000 { 1000 } else { missing };
        people[1].send(msg(length - "MSG p2 \r\n".len()));
        sim.run(MILLISECOND);
        if length == missing {
            return (sim, people);
        }
    }
}

#[test]
fn limits_are_passed_by_the_first_byte_beyond_them() {
    assert!(behind(SOFT_LIMIT + 1).0.is_limited());
    let (mut sim, [slow, _]) = behind(SOFT_LIMIT);
    assert!(!sim.is_limited());
    for (own_bytes, applies) in [(OWN_BYTES_LIMIT, false), (OWN_BYTES_LIMIT + 1, true)] {
        sim.server.room.budget.update(own_bytes, os::now());
        assert_eq!(sim.is_limited(), applies);
    }
    for (length, takes) in [(REPLY_LIMIT, true), (1, false)] {
        sim.server.room.push_own(1, vec![b'x'; length], true);
        let client = sim.server.room.clients.get(1).expect("a client");
        assert_eq!(client.takes_requests(), takes, "{length} bytes");
    }
    for (bytes, is_dropped) in [(HARD_LIMIT - SOFT_LIMIT, false), (1, true)] {
        sim.server.room.push_own(0, vec![b'x'; bytes], false);
        // Private messages after the last reply do not count.
        assert!(sim.server.room.clients.get(0).is_some_and(Client::takes_requests));
        sim.turn();
        assert_eq!(slow.is_dropped(), is_dropped);
    }
}

#[test]
fn a_stalled_client_is_removed_only_while_the_budget_applies() {
    // A few bytes are pending for p3, whose window is small, since the beginning.
    let (mut sim, [slow, p2]) = behind(SOFT_LIMIT - 1000);
    let window = Buffers { window: 500, unsent: 1, ..Buffers::default() };
    let stalled = arrive(window, "NAME p3\n");
    sim.run(MILLISECOND);
    p2.send(format!("PRIV @p3 {}\n", "x".repeat(1000)));
    sim.run(seconds(200));
    assert!(sim.pending(2) > 0 && !stalled.is_dropped() && !slow.is_dropped());
    p2.send(msg(1000));
    sim.run(MILLISECOND);
    for second in 0..62 {
        let dropped = [slow.is_dropped(), stalled.is_dropped()];
        assert_eq!(dropped, [second >= 60; 2], "after {second} seconds");
        sim.run(seconds(1));
    }
}

// The budget

#[test]
fn the_budget_is_kept_while_a_client_is_behind_and_limits_nothing_otherwise() {
    let floods = [SHORT, LONG, Request::Any].map(flooder);
    let mut sim = crowd([restless(); 2].into_iter().chain(floods));
    sim.run(100 * MILLISECOND);
    assert!(!sim.is_limited());
    assert!(sim.crowd.past.history.text.len() > 1_000_000, "somebody is limited");
    sim.crowd.add(deaf());
    sim.run_until_limited();
    let all = sim.run_limited(seconds(48));
    assert!(all > 46 * 65_536, "only {all} bytes in 48 seconds");
}

#[test]
fn each_request_pays_its_cost_once() {
    let (mut sim, [_, p2]) = behind(SOFT_LIMIT + 1);
    let p3 = sim.connect([10, 0, 0, 3], "NAME p3\n");
    let p4 = sim.connect([10, 0, 0, 4], "");
    sim.run(seconds(10));
    p2.send("MSG hello\n");
    p3.send("PRIV @p3 hi\nPRIV @nobody hi\nPRIV @p2 psst\nQUIT\n");
    p4.send("PING\nNAME nobody can have this name\nLIST\nHELP\nNAME carol\n");
    // Not paid in the turn in which they are read.
    sim.turn();
    let full = os::now();
    sim.turn();
    let costs = ["MSG p2 hello\r\n".len(), "PRIV p3 psst\r\n".len(), 2 * "carol".len() + 43];
    let cost: usize = costs.iter().sum();
    assert_eq!(sim.server.room.budget.paid_until.unwrap() - full, time_for(cost as u64));
    sim.run(MILLISECOND);
    let lines = take_lines(p2);
    let told = |start| lines.iter().any(|line| line.starts_with(start));
    assert!(["PRIV p3 psst", "LEFT p3 ", "JOINED carol"].into_iter().all(told), "{lines:?}");
}

/// A hundred people leave, and as many join, while somebody is behind.
#[test]
fn leaves_and_joins_delay_no_short_line() {
    for ending in [Ending::Quit, Ending::HalfClose, Ending::Reset] {
        let mut sim = crowd([typist(500 * MILLISECOND, 100 * MILLISECOND); 2]);
        sim.add_all([newcomer(); 101]);
        sim.crowd.add(deaf());
        sim.run(MILLISECOND);
        let flood = sim.crowd.add(flooder(LONG));
        sim.run_until_limited();
        sim.crowd.end(flood, Ending::Quit);
        sim.run(seconds(1));
        (3..=103).for_each(|id| sim.crowd.end(id, ending));
        sim.add_all([newcomer(); 98]);
        sim.run_limited(100 * MILLISECOND);
        assert_eq!(sim.present(3..=103), 0, "a leave waits");
        sim.run_limited(seconds(1));
        assert_eq!(sim.present(106..=203), 98);
    }
}

#[test]
fn a_flood_of_200_delays_a_short_line_by_less_than_half_a_second() {
    let whispers = Request::Priv { to: 1, length: 0 };
    for others in [flooder(SHORT), flooder(LONG), flooder(whispers), restless()] {
        let typist = typist(500 * MILLISECOND, seconds(1));
        let mut sim = crowd([deaf(), typist, typist]);
        sim.run(seconds(1));
        sim.add_all([others; 200]);
        sim.run(seconds(5));
        assert!(sim.is_limited());
    }
}

// Fair turns

#[test]
fn a_request_waits_for_a_few_turns_while_nobody_is_behind() {
    // A turn's writes to 60 people take 0.8 ms, and 20 flooders take 16 ms to have a turn each.
    let typist = typist(4 * MILLISECOND, 50 * MILLISECOND);
    for (flooders, request) in [(1, SHORT), (20, SHORT), (20, Request::List), (20, Request::Any)] {
        let mut sim = crowd([Behaviour::default(); 30]);
        sim.run(seconds(1));
        sim.add_all(vec![flooder(request); flooders]);
        sim.run(30 * MILLISECOND);
        sim.add_all([typist; 10]);
        sim.run(100 * MILLISECOND);
    }
}

#[test]
fn reading_fills_a_turn_though_it_asks_for_nothing() {
    let mut sim = server();
    let people = [(); 20].map(|()| sim.connect([10, 0, 0, 1], ""));
    people.iter().for_each(|peer| peer.send([b'\n'; Server::READ_SIZE]));
    sim.turn();
    let read = people.iter().filter(|peer| peer.unread() == 0).count() * Server::READ_SIZE;
    assert_eq!(read as u64 * Room::BYTE_FOR_ALL, Room::FULL_TURN);
}

/// A room of a thousand, all of which read, on a machine with `COSTS`; the peers, and a bystander.
fn big_room() -> (Simulation, Vec<Peer>, Peer) {
    let mut sim = Simulation::new(1, COSTS, options());
    let names = (0..999).map(|at| format!("NAME {at:x<40}\n"));
    let people = names.map(|name| arrive(Buffers::DISCARDING, &name)).collect();
    let bystander = arrive(Buffers::UNLIMITED, "NAME bystander\n");
    sim.run(seconds(2));
    (sim, people, bystander)
}

#[test]
fn a_burst_of_199_long_lines_or_a_flood_of_50_delays_a_reply_by_a_moment() {
    let (mut sim, people, bystander) = big_room();
    people[..199].iter().for_each(|peer| peer.send(msg(3900)));
    let ping = sim.delay(bystander, "PING", "PONG");
    assert!(ping < 350 * MILLISECOND, "{ping:?} after a burst of long lines");
    sim.run(seconds(2));
    people[..50].iter().for_each(|peer| peer.send("MSG x\n".repeat(20_000)));
    sim.run(100 * MILLISECOND);
    let list = sim.delay(bystander, "LIST", "USERS 1000 ");
    // The roster delays the next reply by a few turns only.
    let ping = sim.delay(bystander, "PING", "PONG");
    assert!(people[..50].iter().any(|peer| peer.unread() > 0));
    let most = list.max(ping);
    assert!(most < 100 * MILLISECOND, "{most:?} in a flood");
}

#[test]
fn requests_that_go_on_together_delay_a_ping_by_few_turns() {
    let (mut sim, people, bystander) = big_room();
    let slow = arrive(Buffers::default(), "NAME slow\n");
    sim.run(seconds(1));
    people[200..300].iter().for_each(|peer| peer.send(msg(3900)));
    sim.run(seconds(1));
    assert!(sim.is_limited());
    people[..199].iter().for_each(|peer| peer.send(msg(3900)));
    sim.run(100 * MILLISECOND);
    while sim.is_limited() {
        take_text(slow);
        sim.turn();
    }
    let waiting = sim.server.room.budget.queue.waiting.len();
    assert!(waiting > 150, "{waiting} requests wait");
    let ping = sim.delay(bystander, "PING", "PONG");
    assert!(ping < 100 * MILLISECOND, "{ping:?}");
}

// Memory

#[test]
fn hundreds_that_read_nothing_share_one_log() {
    let mut sim = crowd([steady(65_536, 65_536)]);
    sim.add_all([deaf(); 300]);
    sim.add_all([flooder(Request::Msg { length: 500 }); 3]);
    let mut most = 0;
    for _ in 0..70 {
        sim.run(seconds(1));
        sim.check_books();
        let Room { log, own_bytes, .. } = &sim.server.room;
        most = most.max(log.bytes.len());
        assert!(*own_bytes < 4 << 20, "{own_bytes} bytes of own lines");
    }
    let most_allowed = 2 * (HARD_LIMIT + MOST_IN_A_TURN);
    assert!((HARD_LIMIT / 2..most_allowed).contains(&most), "a log of {most} bytes");
    assert_eq!((sim.present([1]), sim.present(2..=301)), (1, 0));
    sim.wind_down();
    assert!(sim.server.room.log.bytes.capacity() <= Log::KEPT_CAPACITY);
}

#[test]
fn hundreds_that_are_whispered_to_and_read_nothing_are_removed() {
    let mut sim = server();
    let join = |at, buffers| arrive(buffers, &format!("NAME p{at}\n"));
    let victims: Vec<Peer> = (0..300).map(|at| join(at, Buffers::default())).collect();
    let whisperers: Vec<Peer> = (300..310).map(|at| join(at, Buffers::DISCARDING)).collect();
    sim.run(seconds(1));
    let (mut most, mut at, mut limited) = (0, 0, None);
    while limited.is_none_or(|since| os::time() < since + seconds(61)) {
        for peer in &whisperers {
            while peer.unread() < 16 * 1024 {
                at += 1;
                let text = "x".repeat(3900);
                peer.send(format!("PRIV @p{} {text}\n", at % victims.len()));
            }
        }
        sim.run(MILLISECOND * if limited.is_none() { 1 } else { 100 });
        if limited.is_none() {
            assert!(!victims.iter().any(|peer| peer.is_dropped()));
            assert!(sim.server.room.budget.over_soft_limit.is_empty(), "over the soft limit");
            limited = sim.is_limited().then(os::time);
        }
        most = most.max(sim.server.room.own_bytes);
    }
    assert!(victims.iter().all(|peer| peer.is_dropped()));
    // One turn's whispers, and then those that the budget pays for.
    let most_allowed = OWN_BYTES_LIMIT + (1 << 20) + 61 * BUDGET;
    assert!((OWN_BYTES_LIMIT..most_allowed).contains(&most), "{most} bytes of own lines");
}

// Suspended processes

#[test]
fn a_suspended_server_removes_nobody_that_was_in_time() {
    for (is_flooded, in_wait) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut sim = server();
        let buffers = Buffers { window: 65_536, step: 30_000, ..Buffers::default() };
        let reader = arrive(buffers, "NAME reader\n");
        let flooder = arrive(Buffers::DISCARDING, "NAME flooder\n");
        let newcomers: Vec<Peer> = (0..500).map(|_| arrive(Buffers::DISCARDING, "")).collect();
        sim.run(seconds(1));
        if is_flooded {
            flooder.send(msg(1000).repeat(600));
            sim.run(seconds(1));
        }
        assert_eq!(sim.is_limited(), is_flooded);
        for (at, peer) in newcomers.iter().enumerate() {
            peer.send(format!("NAME {at:x<50}\n"));
        }
        reader.take(40_000, &mut Vec::new());
        os::suspend(seconds(70), in_wait);
        sim.turn();
        sim.run(seconds(15));
        assert!(!reader.is_dropped());
        assert!(!newcomers.iter().any(|peer| peer.is_dropped() || peer.sees_end()));
        assert_eq!(sim.server.room.members.len(), 502);
    }
}

// Replies, closing and time-outs

#[test]
fn a_closing_connection_keeps_its_slot_until_it_is_over() {
    let for_all = Options { max_clients: 1, ..options() };
    let for_one_address = Options { max_per_ip: Some(1), ..options() };
    for (limits, text, greets_others) in [
        (for_all, "no more connections can be taken now; try again later", false),
        (for_one_address, "too many connections from your address", true),
    ] {
        let mut sim = Simulation::new(1, Conditions::default(), limits);
        let here = [10, 0, 0, 1];
        // Without output, and with output that is not taken.
        for (requests, there) in [(0, [10, 0, 0, 2]), (9_000, [10, 0, 0, 3])] {
            let requests = "LIST\n".repeat(requests);
            let ana = sim.connect(here, &format!("NAME ana\n{requests}QUIT\n"));
            sim.run(seconds(58));
            let refused = sim.connect(here, "");
            assert_eq!(take_text(refused), format!("ERR full {text}\r\n"));
            assert!(refused.sees_end());
            assert!(sim.console.contains(&format!("10.0.0.1:1024 refused: \"{text}\"")));
            assert_eq!(sim.greets(there), greets_others);
            assert!(!ana.is_dropped());
            sim.run(seconds(3));
            assert!(ana.is_dropped());
        }
        let ana = sim.connect(here, "NAME ana\nQUIT\n");
        assert!(take_text(ana).contains("BYE ") && ana.sees_end());
        ana.close();
        sim.turn();
        assert!(sim.greets(here));
    }
}

#[test]
fn a_closing_client_is_dropped_after_a_minute_whatever_it_takes_or_at_once_by_a_reset() {
    for (progress, resets) in [(0, false), (1000, false), (0, true)] {
        let mut sim = server();
        let [ana, bob] = ["NAME ana\n", "NAME bob\n"].map(|it| sim.connect([10, 0, 0, 1], it));
        ana.send(format!("{}QUIT\n", "LIST\n".repeat(9_000)));
        sim.run(seconds(1));
        // It takes only a little of its output.
        while !take_text(bob).contains("LEFT ana") {
            ana.take(100, &mut Vec::new());
            sim.run(MILLISECOND);
        }
        if resets {
            ana.send([b'x'; 100_000]);
            assert!(!ana.is_dropped());
            ana.reset();
            sim.turn();
            assert!(ana.is_dropped());
            continue;
        }
        for second in 0..70 {
            assert_eq!(ana.is_dropped(), second >= 60, "after {second} seconds");
            ana.take(progress, &mut Vec::new());
            bob.send("MSG what others say is no progress\n");
            sim.run(seconds(1));
        }
    }
}

#[test]
fn a_client_without_a_name_is_told_and_dropped() {
    let mut sim = server();
    let silent = sim.connect([10, 0, 0, 1], "PING\n");
    sim.run(seconds(59));
    assert_eq!(take_lines(silent).len(), 2);
    // At once, though the server has nothing else to wake up for.
    let greeted = silent.all_written();
    while silent.all_written() == greeted {
        sim.turn();
    }
    assert!((seconds(60)..seconds(61)).contains(&os::time()), "told after {:?}", os::time());
    assert!(take_text(silent).starts_with("ERR timeout "));
    assert!(sim.console.contains(" 10.0.0.1:1024 left (timeout)\n"));
    assert!(silent.sees_end() && !silent.is_dropped());
    sim.run(seconds(60) + MILLISECOND);
    assert!(silent.is_dropped());
    // A connection that ends without a name is gone in the same turn.
    let shy = sim.connect([10, 0, 0, 1], "");
    shy.half_close();
    sim.turn();
    assert!(take_text(shy).starts_with("HELLO ") && shy.is_dropped());
}

#[test]
fn a_flood_of_pings_is_no_name() {
    let mut sim = Simulation::new(1, COSTS, options());
    let nameless = arrive(Buffers::UNLIMITED, "");
    for _ in 0..61 {
        nameless.send("PING\n".repeat(20_000));
        sim.run(seconds(1));
    }
    assert!(take_lines(nameless).last().is_some_and(|line| line.starts_with("ERR timeout ")));
}

#[test]
fn a_reset_while_a_request_waits_is_reported_once() {
    let (mut sim, [_, p2]) = behind(SOFT_LIMIT + 1);
    p2.send(msg(3900).repeat(40));
    sim.run(MILLISECOND);
    p2.reset();
    let (end, mut turns) = (os::time() + seconds(1), 0);
    while os::time() < end {
        sim.turn_before(Some(end));
        turns += 1;
        assert!(turns < 200, "in one second");
    }
}

#[test]
fn a_client_that_is_removed_loses_its_waiting_request() {
    let (mut sim, [slow, _]) = behind(SOFT_LIMIT + 1);
    slow.send(msg(3900).repeat(40));
    sim.run(MILLISECOND);
    sim.server.room.push_own(0, vec![b'x'; HARD_LIMIT], false);
    sim.turn();
    assert!(slow.is_dropped());
    sim.check_books();
}

// Accepting, the console, stopping

#[test]
fn a_failing_accept_delays_nobody_unless_the_reason_may_last() {
    use ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, OutOfMemory};
    let mut sim = server();
    os::fail_accept(&[ConnectionAborted, ConnectionReset, Interrupted]);
    assert!(sim.greets([10, 0, 0, 1]));
    os::fail_accept(&[OutOfMemory; 4]);
    let before = os::calls().count;
    let ana = sim.connect([10, 0, 0, 2], "");
    sim.run(900 * MILLISECOND);
    let count = os::calls().count - before;
    assert!(take_text(ana).is_empty() && count < 40, "{count} system calls in a second");
    sim.run(seconds(1));
    assert!(take_text(ana).starts_with("HELLO "));
}

#[test]
fn a_limit_for_one_address_counts_a_network_of_ipv6() {
    let greeted = |max_per_ip, addresses: &mut dyn Iterator<Item = IpAddr>| {
        let options = Options { max_per_ip, ..options() };
        let mut sim = Simulation::new(1, Conditions::default(), options);
        addresses.filter(|&it| sim.greets(it)).count()
    };
    let v6 = |network, host| IpAddr::from([0x2001, 0xdb8, 0, network, 0, 0, 0, host]);
    assert_eq!(greeted(Some(3), &mut (1..180).map(|host| v6(1, host))), 3);
    assert_eq!(greeted(Some(3), &mut (1..180).map(|network| v6(network, 1))), 179);
    let mapped = IpAddr::from([0, 0, 0, 0, 0, 0xffff, 0x0a00, 1]);
    let ipv4 = IpAddr::from([10, 0, 0, 1]);
    assert_eq!(greeted(Some(3), &mut [ipv4, mapped, ipv4, mapped].into_iter()), 3);
    assert_eq!(greeted(Some(0), &mut [ipv4; 300].into_iter()), 300);
    assert_eq!(greeted(None, &mut [ipv4; 300].into_iter()), 200);
    // This machine's own addresses are limited only if asked for.
    for own in [[192, 0, 2, 1], [127, 0, 0, 1]].map(IpAddr::from) {
        assert_eq!(greeted(None, &mut [own; 300].into_iter()), 300);
        assert_eq!(greeted(Some(3), &mut [own; 300].into_iter()), 3);
    }
}

#[test]
fn the_console_tells_every_ten_seconds_that_the_budget_applies() {
    let mut sim = crowd([steady(300_000, 65_536), flooder(LONG)]);
    sim.run_until_limited();
    sim.run(seconds(35));
    let told = sim.console.split(" the rate limit applies: ").skip(1);
    let address = " KiB pending for 10.";
    let pending = told.map(|it| it.split_once(address).expect("a client").0.parse().expect("KiB"));
    let pending: Vec<usize> = pending.collect();
    assert!(matches!(pending[..], [256..400, _, _, ..]) && pending.len() <= 4, "{pending:?} KiB");
}

#[test]
fn a_stop_delivers_everything_though_clients_still_send() {
    let conditions = Conditions { partial: 20, ..Conditions::default() };
    let mut sim = Simulation::new(1, conditions, options());
    let names = ["bob", "p1", "p2", "p3"];
    let people = names.map(|name| sim.connect([10, 0, 0, 2], &format!("NAME {name}\n")));
    people[0].send(msg(3900).repeat(100));
    sim.run(100 * MILLISECOND);
    os::signal();
    let mut received = [(); 4].map(|()| Vec::new());
    while !sim.server.has_stopped() {
        for (peer, received) in people.iter().zip(&mut received) {
            peer.send("MSG I did not see it yet\n");
            // More than is read in one turn.
            peer.send([b'\n'; 20_000]);
            peer.take(20_000, received);
            if peer.sees_end() {
                peer.close();
            }
        }
        sim.run(5 * MILLISECOND);
    }
    for received in &received[1..] {
        let text = String::from_utf8_lossy(received);
        assert_eq!(text.matches("MSG bob x").count(), 100);
        assert!(text.lines().last().is_some_and(|line| line.starts_with("BYE ")), "{text}");
    }
    assert!(os::time() < seconds(1), "an end is not noticed");
}

#[test]
fn a_stop_waits_a_second_for_clients_that_do_not_read() {
    let (mut sim, [_, p2]) = behind(SOFT_LIMIT + 1);
    // Requests that wait for the budget are not carried out any longer.
    p2.send(msg(3900).repeat(20));
    sim.run(MILLISECOND);
    os::signal();
    let since = os::time();
    sim.run(seconds(5));
    assert!(sim.server.has_stopped());
    assert!((STOP_TIMEOUT..STOP_TIMEOUT + 10 * MILLISECOND).contains(&(os::time() - since)));
    assert!(take_lines(p2).last().is_some_and(|line| line.starts_with("BYE ")));
}
