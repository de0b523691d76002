//! The whole server in situations that are not left to chance: one for each promise of PROTOCOL.md,
//! "Closing and half-closing" and "Annex B", and for each way in which a server may break it. Where
//! the people of a `Crowd` take part, the checks of simulation_tests.rs are made here, too.

use super::*;

const MILLISECOND: Duration = Duration::from_millis(1);

/// What a small machine needs for a system call, and for moving bytes.
const COSTS: Conditions = Conditions {
    partial: 0,
    call_cost: Duration::from_nanos(3500),
    kib_cost: Duration::from_nanos(300),
};

fn flooder(request: Flood) -> Behaviour {
    let kind = Kind::Flooder { request, pause: MILLISECOND };
    Behaviour { kind, has_long_name: true, ..Behaviour::default() }
}

fn lurker(reading: Reading) -> Behaviour {
    Behaviour { kind: Kind::Talker { pause: seconds(1_000_000) }, reading, ..Behaviour::default() }
}

fn steady(rate: usize, step: usize) -> Behaviour {
    lurker(Reading::Steady { rate, step })
}

/// Types a short line now and then, which must be passed on within `max_delay`.
fn typist(max_delay: Duration, pause: Duration) -> Behaviour {
    let kind = Kind::Talker { pause };
    Behaviour { kind, max_delay: Some(max_delay), ..Behaviour::default() }
}

/// Joins and quits, again and again.
fn restless() -> Behaviour {
    let ending = Some((Duration::from_micros(1), Ending::Quit));
    Behaviour { ending, comes_again: true, ..lurker(Reading::Eager) }
}

const SHORT: Flood = Flood::Msg { length: 0 };

impl Simulation {
    fn add_all(&mut self, behaviours: impl IntoIterator<Item = Behaviour>) {
        for behaviour in behaviours {
            self.add(behaviour);
        }
    }

    fn with(behaviours: impl IntoIterator<Item = Behaviour>) -> Self {
        let mut simulation = Simulation::new(1, COSTS, options());
        simulation.add_all(behaviours);
        simulation
    }

    fn run_until_limited(&mut self) {
        while !self.session.server.room.budget.applies() {
            self.run(10 * MILLISECOND);
            assert!(os::time() < seconds(20), "nobody is ever over the soft limit");
        }
    }

    /// Runs while the budget applies, and is kept.
    fn run_limited(&mut self, time: Duration) {
        let since = os::time();
        let before = self.crowd.borrow().history.cost;
        while os::time() < since + time {
            self.run(10 * MILLISECOND);
            let cost = self.crowd.borrow().history.cost - before;
            let earned = BUDGET as f64 * (1.0 + (os::time() - since).as_secs_f64());
            assert!(cost as f64 <= earned, "{cost} bytes instead of {earned}");
            assert!(self.session.server.room.budget.applies());
        }
    }

    fn is_here(&self, id: usize) -> bool {
        self.crowd.borrow().history.room.contains(&id)
    }
}

/// A request that says so many bytes.
fn msg(length: usize) -> String {
    format!("MSG {}\n", "x".repeat(length))
}

/// A connection on which `lines` are sent.
fn arrive(buffers: Buffers, lines: &str) -> Peer {
    let peer = Peer::connect(([10, 0, 0, 1], 1024).into(), buffers);
    peer.send(lines.as_bytes());
    peer
}

impl Session {
    /// Sends a request; returns the time until the line of the answer that begins so has come.
    fn delay(&mut self, peer: Peer, request: &str, answer: &str) -> Duration {
        let since = os::time();
        peer.send(format!("{request}\n").as_bytes());
        while !take_lines(peer).iter().any(|line| line.starts_with(answer)) {
            self.turn();
            assert!(os::time() < since + seconds(20), "no answer to {request}");
        }
        os::time() - since
    }
}

impl Session {
    /// These clients join as if it were long ago: everybody has received it.
    fn join_unnoticed(&mut self, clients: std::ops::Range<Id>) {
        let room = &mut self.server.room;
        let logged = room.log.bytes.len();
        clients.clone().for_each(|id| room.join(id, &format!("{id:x<50}")));
        room.log.bytes.truncate(logged);
        for id in clients {
            room.clients.get_mut(id).expect("a client").outbox.start_at_end(&room.log);
        }
    }
}

// Clients that read at least 64 KiB a second stay

#[test]
fn floods_remove_no_reader() {
    for flooders in [1, 3, 10] {
        let readers = [300_000, 1_250_000, 12_500_000].map(|rate| steady(rate, 65_536));
        let floods = vec![flooder(SHORT); flooders];
        let mut simulation = Simulation::with(readers.into_iter().chain(floods));
        simulation.run(seconds(5));
        assert!((1..=3).all(|id| simulation.is_here(id)));
        simulation.wind_down();
    }
}

#[test]
fn whispers_neither_remove_nor_silence_their_victim() {
    for rate in [65_536, 3_000_000] {
        let kind = Kind::Flooder { request: Flood::Ping, pause: 100 * MILLISECOND };
        let victim = Behaviour { kind, ..steady(rate, 65_536) };
        let floods = vec![flooder(Flood::Priv { to: 1 }); 9];
        let mut simulation = Simulation::with([victim].into_iter().chain(floods));
        let pongs = [1, 4].map(|time| {
            simulation.run(seconds(time) - os::time());
            simulation.crowd.borrow().people[1].pongs()
        });
        assert!(simulation.is_here(1));
        // At the budget's rate, all the whispers that are pending come before each PONG.
        assert!(
            rate == BUDGET || pongs[1] > pongs[0] + 5,
            "{pongs:?} replies after 1 and 4 seconds"
        );
        simulation.wind_down();
    }
}

#[test]
fn own_messages_count_as_pending_while_something_before_them_is() {
    let mut session = Session::new(1, Conditions::default(), options());
    let window = Buffers { window: 100, unsent: 1, ..Buffers::default() };
    let talker = arrive(window, "NAME talker\n");
    session.connect([10, 0, 0, 1], "NAME reader\n");
    talker.send(msg(3000).repeat(100).as_bytes());
    session.run(seconds(1));
    assert!(session.pending(0) > SOFT_LIMIT && session.server.room.budget.applies());
    session.run(seconds(61));
    assert!(talker.is_dropped() && session.server.room.log.bytes.is_empty());
}

#[test]
fn joins_and_quits_remove_no_reader() {
    let readers = vec![steady(300_000, 65_536); 97];
    let mut simulation = Simulation::with(readers.into_iter().chain(vec![restless(); 8]));
    simulation.run(seconds(5));
    assert!((1..=97).all(|id| simulation.is_here(id)));
    simulation.wind_down();
}

/// The worst burst that is not paid for: ten thousand people, who have joined while no budget
/// applied, leave just before a slow reader's kernel takes two mebibytes of a flood.
#[test]
fn ten_thousand_leaves_do_not_remove_a_reader() {
    let mut session = Session::new(1, Conditions::default(), options());
    let window = Buffers { window: 4 << 20, step: 2 << 20, ..Buffers::default() };
    let reader = arrive(window, "NAME reader\n");
    let flooder = arrive(Buffers::DISCARDING, "NAME flooder\n");
    let crowd: Vec<Peer> = (0..10_000).map(|_| arrive(Buffers::DISCARDING, "")).collect();
    let (mut taken, mut most) = (Vec::new(), 0);
    for tenth in 0..450 {
        while flooder.unread() < 66_000 {
            flooder.send(msg(1000).as_bytes());
        }
        session.run(100 * MILLISECOND);
        reader.take(6554, &mut taken);
        most = most.max(session.pending(0));
        if tenth == 315 {
            session.join_unnoticed(2..2 + crowd.len());
            crowd.iter().for_each(|peer| peer.reset());
        }
    }
    assert!(most > 5 << 19, "at most {most} bytes were pending");
    assert!(!reader.is_dropped() && session.server.room.members.len() == 2);
}

#[test]
fn a_silent_client_is_removed_after_a_minute_and_a_slow_one_at_four_mebibytes() {
    let readers = [lurker(Reading::Never), steady(10_000, 1000)];
    let mut simulation = Simulation::with(readers.into_iter().chain([flooder(SHORT); 4]));
    simulation.run_until_limited();
    simulation.run(seconds(58));
    assert!(simulation.is_here(1) && simulation.is_here(2));
    simulation.run(seconds(4));
    assert!(!simulation.is_here(1) && simulation.is_here(2));
    while simulation.is_here(2) {
        assert!(os::time() < seconds(90));
        simulation.run(10 * MILLISECOND);
    }
    simulation.wind_down();
}

/// The peers p1 and p2; p1 takes nothing, and this many bytes are pending for it.
fn behind(bytes: usize) -> (Session, [Peer; 2]) {
    let mut session = Session::new(1, Conditions::default(), options());
    let people = [1, 2].map(|at| session.connect([10, 0, 0, at], &format!("NAME p{at}\n")));
    loop {
        let missing = bytes - session.pending(0);
        let length = if missing > 2000 { 1000 } else { missing };
        people[1].send(msg(length - "MSG p2 \r\n".len()).as_bytes());
        session.run(MILLISECOND);
        if length == missing {
            return (session, people);
        }
    }
}

#[test]
fn limits_are_passed_by_the_first_byte_beyond_them() {
    assert!(behind(SOFT_LIMIT + 1).0.server.room.budget.applies());
    let (mut session, [slow, _]) = behind(SOFT_LIMIT);
    assert!(!session.server.room.budget.applies());
    for (bytes, is_dropped) in [(HARD_LIMIT - SOFT_LIMIT, false), (1, true)] {
        session.server.room.push_own(0, &vec![b'x'; bytes], false);
        session.turn();
        assert_eq!(slow.is_dropped(), is_dropped);
    }
}

#[test]
fn a_stalled_client_is_removed_only_while_the_budget_applies() {
    // A few bytes are pending for p3, whose window is small, since the beginning.
    let (mut session, [slow, p2]) = behind(SOFT_LIMIT - 1000);
    let window = Buffers { window: 500, unsent: 1, ..Buffers::default() };
    let stalled = arrive(window, "NAME p3\n");
    session.run(MILLISECOND);
    p2.send(format!("PRIV @p3 {}\n", "x".repeat(1000)).as_bytes());
    session.run(seconds(200));
    assert!(session.pending(2) > 0 && !stalled.is_dropped() && !slow.is_dropped());
    p2.send(msg(1000).as_bytes());
    session.run(MILLISECOND);
    for second in 0..62 {
        assert_eq!(slow.is_dropped(), second >= 60, "after {second} seconds");
        assert_eq!(stalled.is_dropped(), second >= 60, "after {second} seconds");
        session.run(seconds(1));
    }
}

#[test]
fn a_slow_reader_stays_when_nothing_more_is_said() {
    for rate in [5000, 12_000] {
        // The kernel's steps are of a minute's worth.
        let reader = steady(rate, rate * 59);
        let mut simulation = Simulation::with([reader, flooder(Flood::Msg { length: 1000 })]);
        while simulation.crowd.borrow().history.text.len() < 700_000 {
            simulation.turn();
        }
        simulation.crowd.borrow_mut().is_over = true;
        simulation.run(seconds(300));
        assert!(simulation.is_here(1));
    }
}

// The budget

#[test]
fn the_budget_is_kept_while_a_client_is_behind_and_limits_nothing_otherwise() {
    let floods = [SHORT, Flood::Msg { length: 3000 }, Flood::Mixed].map(flooder);
    let mut simulation = Simulation::with([restless(); 2].into_iter().chain(floods));
    simulation.run(100 * MILLISECOND);
    assert!(!simulation.session.server.room.budget.applies());
    assert!(simulation.crowd.borrow().history.text.len() > 1_000_000, "somebody is limited");
    simulation.add(lurker(Reading::Never));
    simulation.run_until_limited();
    let before = simulation.crowd.borrow().history.text.len();
    simulation.run_limited(seconds(48));
    let all = simulation.crowd.borrow().history.text.len() - before;
    assert!(all > 46 * 65_536, "only {all} bytes in 48 seconds");
}

#[test]
fn each_request_pays_its_cost_once() {
    let (mut session, [_, p2]) = behind(SOFT_LIMIT + 1);
    let p3 = session.connect([10, 0, 0, 3], "NAME p3\n");
    let p4 = session.connect([10, 0, 0, 4], "");
    session.run(seconds(10));
    p2.send(b"MSG hello\n");
    p3.send(b"PRIV @p2 psst\nQUIT\n");
    p4.send(b"PING\nNAME nobody can have this name\nLIST\nHELP\nNAME carol\n");
    // Not paid in the turn in which they are read.
    session.turn();
    let full = os::now();
    session.turn();
    let costs = ["MSG p2 hello\r\n".len(), "PRIV p3 psst\r\n".len(), 2 * "carol".len() + 43];
    let cost: usize = costs.iter().sum();
    assert_eq!(session.server.room.budget.paid_until.unwrap() - full, time_for(cost as u64));
    session.run(MILLISECOND);
    let lines = take_lines(p2);
    let told = |start| lines.iter().any(|line| line.starts_with(start));
    assert!(["PRIV p3 psst", "LEFT p3 ", "JOINED carol"].into_iter().all(told), "{lines:?}");
}

/// A hundred people leave, and as many join, while somebody is behind.
#[test]
fn leaves_and_joins_delay_no_short_line() {
    let people = vec![Behaviour { has_long_name: true, ..lurker(Reading::Eager) }; 101];
    for ending in [Ending::Quit, Ending::HalfClose, Ending::Reset] {
        let half_a_second = 500 * MILLISECOND;
        let typists = [typist(half_a_second, 100 * MILLISECOND); 2];
        let mut simulation = Simulation::with(typists.into_iter().chain(people.clone()));
        simulation.add(lurker(Reading::Never));
        simulation.run(MILLISECOND);
        let flood = simulation.add(flooder(Flood::Msg { length: 3000 }));
        simulation.run_until_limited();
        simulation.crowd.borrow_mut().end(flood, Ending::Quit);
        simulation.run(seconds(1));
        (3..=103).for_each(|id| simulation.crowd.borrow_mut().end(id, ending));
        simulation.add_all(people[..98].iter().copied());
        simulation.run_limited(100 * MILLISECOND);
        assert!(!(3..=103).any(|id| simulation.is_here(id)), "a leave waits");
        simulation.run_limited(seconds(1));
        assert!((106..=203).all(|id| simulation.is_here(id)));
    }
}

#[test]
fn a_flood_of_200_delays_a_short_line_by_less_than_half_a_second() {
    let talk = |length| flooder(Flood::Msg { length });
    for others in [talk(0), talk(3000), flooder(Flood::Priv { to: 1 }), restless()] {
        let typist = typist(500 * MILLISECOND, seconds(1));
        let mut simulation = Simulation::with([lurker(Reading::Never), typist, typist]);
        simulation.run(seconds(1));
        simulation.add_all(vec![others; 200]);
        simulation.run(seconds(5));
        assert!(simulation.session.server.room.budget.applies());
    }
}

#[test]
fn a_name_that_waits_for_the_budget_came_in_time() {
    let options = Options { name_timeout: seconds(1), ..options() };
    let mut simulation = Simulation::new(1, COSTS, options);
    simulation.add_all([lurker(Reading::Never), flooder(SHORT)]);
    simulation.run_until_limited();
    let newcomer = Behaviour { has_long_name: true, ..lurker(Reading::Eager) };
    simulation.add_all(vec![newcomer; 900]);
    simulation.run(seconds(1));
    assert!(!(3..=902).all(|id| simulation.is_here(id)), "nobody waits for longer than that");
    simulation.run(seconds(15));
    assert!((3..=902).all(|id| simulation.is_here(id)));
}

// Fair turns

#[test]
fn a_request_waits_for_a_few_turns_while_nobody_is_behind() {
    // A turn's writes to 60 people take 0.8 ms, and 20 flooders take 16 ms to have a turn each.
    let (max_delay, pause) = (4 * MILLISECOND, 50 * MILLISECOND);
    for (flooders, request) in [(1, SHORT), (20, SHORT), (20, Flood::List), (20, Flood::Mixed)] {
        let mut simulation = Simulation::with(vec![lurker(Reading::Eager); 30]);
        simulation.run(seconds(1));
        simulation.add_all(vec![flooder(request); flooders]);
        simulation.run(30 * MILLISECOND);
        simulation.add_all(vec![typist(max_delay, pause); 10]);
        simulation.run(100 * MILLISECOND);
    }
}

#[test]
fn a_small_request_is_served_before_an_earlier_flood() {
    let mut session = Session::new(1, Conditions::default(), options());
    let [ana, bob] =
        ["ana", "bob"].map(|name| session.connect([10, 0, 0, 1], &format!("NAME {name}\n")));
    ana.send(msg(1000).repeat(120).as_bytes());
    session.turn();
    bob.send(b"PING\n");
    // In the first of these turns they are level.
    session.turn();
    session.turn();
    assert!(take_lines(bob).contains(&"PONG".to_owned()) && ana.unread() > 0);
}

#[test]
fn reading_fills_a_turn_though_it_asks_for_nothing() {
    let mut session = Session::new(1, Conditions::default(), options());
    let people = [(); 20].map(|()| session.connect([10, 0, 0, 1], ""));
    people.iter().for_each(|peer| peer.send(&[b'\n'; Server::READ_SIZE]));
    session.turn();
    let read = people.iter().filter(|peer| peer.unread() == 0).count() * Server::READ_SIZE;
    assert_eq!(read as u64 * Room::BYTE_FOR_ALL, Room::FULL_TURN);
}

/// A room of a thousand, all of which read, on a machine with `COSTS`; the peers, and a bystander.
fn big_room() -> (Session, Vec<Peer>, Peer) {
    let mut session = Session::new(1, COSTS, options());
    let names = (0..999).map(|at| format!("NAME {at:x<40}\n"));
    let people = names.map(|name| arrive(Buffers::DISCARDING, &name)).collect();
    let bystander = arrive(Buffers::UNLIMITED, "NAME bystander\n");
    session.run(seconds(2));
    (session, people, bystander)
}

#[test]
fn one_roster_of_a_big_room_delays_the_next_reply_of_a_flood_by_few_turns() {
    let (mut session, people, bystander) = big_room();
    people[..50].iter().for_each(|peer| peer.send(&b"MSG x\n".repeat(20_000)));
    session.run(100 * MILLISECOND);
    let list = session.delay(bystander, "LIST", "USERS 1000 ");
    let ping = session.delay(bystander, "PING", "PONG");
    assert!(people[..50].iter().any(|peer| peer.unread() > 0));
    let most = list.max(ping);
    assert!(most < 100 * MILLISECOND, "{most:?}");
}

#[test]
fn a_burst_of_199_long_lines_delays_a_ping_by_a_third_of_a_second() {
    let (mut session, people, bystander) = big_room();
    let line = msg(3900);
    people[..199].iter().for_each(|peer| peer.send(line.as_bytes()));
    let ping = session.delay(bystander, "PING", "PONG");
    assert!(ping < 350 * MILLISECOND, "{ping:?}");
}

#[test]
fn requests_that_go_on_together_delay_a_ping_by_few_turns() {
    let (mut session, people, bystander) = big_room();
    let slow = arrive(Buffers::default(), "NAME slow\n");
    session.run(seconds(1));
    let line = msg(3900);
    people[200..300].iter().for_each(|peer| peer.send(line.as_bytes()));
    session.run(seconds(1));
    assert!(session.server.room.budget.applies());
    people[..199].iter().for_each(|peer| peer.send(line.as_bytes()));
    session.run(100 * MILLISECOND);
    while session.server.room.budget.applies() {
        slow.take(usize::MAX, &mut Vec::new());
        session.turn();
    }
    let waiting = session.server.room.budget.queue.waiting.len();
    assert!(waiting > 150, "{waiting} requests wait");
    let ping = session.delay(bystander, "PING", "PONG");
    assert!(ping < 100 * MILLISECOND, "{ping:?}");
}

// Memory

#[test]
fn hundreds_that_read_nothing_share_one_log() {
    let floods = [flooder(Flood::Msg { length: 500 }); 3];
    let readers = [steady(65_536, 65_536)].into_iter().chain(vec![lurker(Reading::Never); 300]);
    let mut simulation = Simulation::with(readers.chain(floods));
    let mut most = 0;
    for _ in 0..70 {
        simulation.run(seconds(1));
        simulation.check_books();
        let room = &simulation.session.server.room;
        most = most.max(room.log.bytes.len());
        assert!(room.own_bytes < 4 << 20, "{} bytes of own lines", room.own_bytes);
    }
    let turn = 256 * 1024;
    assert!((HARD_LIMIT..2 * (HARD_LIMIT + turn)).contains(&most), "a log of {most} bytes");
    assert!(simulation.is_here(1) && !(2..=301).any(|id| simulation.is_here(id)));
    simulation.wind_down();
}

#[test]
fn hundreds_that_are_whispered_to_and_read_nothing_are_removed() {
    let mut session = Session::new(1, Conditions::default(), options());
    let victims: Vec<Peer> =
        (0..300).map(|at| arrive(Buffers::default(), &format!("NAME v{at}\n"))).collect();
    let whisperers = (0..10).map(|at| format!("NAME w{at}\n"));
    let whisperers: Vec<Peer> = whisperers.map(|name| arrive(Buffers::DISCARDING, &name)).collect();
    session.run(seconds(1));
    let (mut most, mut at, mut limited) = (0, 0, None);
    while limited.is_none_or(|since| os::time() < since + seconds(61)) {
        for peer in &whisperers {
            while peer.unread() < 16 * 1024 {
                at += 1;
                let text = "x".repeat(3900);
                peer.send(format!("PRIV @v{} {text}\n", at % victims.len()).as_bytes());
            }
        }
        session.run(MILLISECOND * if limited.is_none() { 1 } else { 100 });
        let Server { room, .. } = &session.server;
        let Room { budget, .. } = room;
        assert!(limited.is_some() || !victims.iter().any(|peer| peer.is_dropped()));
        most = most.max(room.own_bytes);
        assert!(
            budget.over_soft_limit.is_empty() || limited.is_some(),
            "somebody is over the soft limit"
        );
        limited = limited.or_else(|| budget.applies().then(os::time));
    }
    assert!(victims.iter().all(|peer| peer.is_dropped()));
    let turn = 1 << 20;
    let most_allowed = OWN_BYTES_LIMIT + turn + 61 * BUDGET;
    assert!((OWN_BYTES_LIMIT..most_allowed).contains(&most), "{most} bytes of own lines");
}

// Suspended processes

#[test]
fn a_suspended_server_removes_nobody_that_was_in_time() {
    for (is_flooded, in_wait) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut session = Session::new(1, Conditions::default(), options());
        let buffers = Buffers { window: 65_536, step: 30_000, ..Buffers::default() };
        let reader = arrive(buffers, "NAME reader\n");
        let flooder = arrive(Buffers::DISCARDING, "NAME flooder\n");
        let newcomers: Vec<Peer> = (0..500).map(|_| arrive(Buffers::DISCARDING, "")).collect();
        session.run(seconds(1));
        if is_flooded {
            flooder.send(msg(1000).repeat(600).as_bytes());
            session.run(seconds(1));
        }
        assert_eq!(session.server.room.budget.applies(), is_flooded);
        let peers = newcomers.clone();
        let suspend = move || {
            for (at, peer) in peers.iter().enumerate() {
                peer.send(format!("NAME {at:x<50}\n").as_bytes());
            }
            reader.take(40_000, &mut Vec::new());
            os::suspend(seconds(70));
        };
        match in_wait {
            true => os::after_wait(suspend),
            false => suspend(),
        }
        // In a wait, this ends with the turn in which the server was suspended.
        session.run(seconds(10));
        session.run(seconds(5));
        assert!(!reader.is_dropped());
        let named = newcomers.iter().filter(|peer| !peer.is_dropped() && !peer.sees_end()).count();
        assert_eq!(named, newcomers.len());
        assert_eq!(session.server.room.members.len(), 502);
    }
}

// Replies, closing and time-outs

#[test]
fn requests_wait_for_replies_to_be_taken_and_not_for_events() {
    let mut session = Session::new(1, Conditions::default(), options());
    let ana = session.connect([10, 0, 0, 1], "NAME ana\n");
    let bob = session.connect([10, 0, 0, 2], "NAME bob\n");
    // More replies than may wait, then events after them, and one more request.
    ana.send(&b"PING 0123456789012345678901234567890123456789\n".repeat(4000));
    session.run(seconds(1));
    bob.send(msg(3900).repeat(70).as_bytes());
    session.run(seconds(1));
    ana.send(b"MSG still here\n");
    session.run(seconds(1));
    assert!(!take_lines(bob).contains(&"MSG ana still here".to_owned()));
    for _ in 0..300 {
        ana.take(1000, &mut Vec::new());
        session.run(MILLISECOND);
    }
    assert!(session.pending(0) > 50_000, "{} bytes", session.pending(0));
    assert!(take_lines(bob).contains(&"MSG ana still here".to_owned()));
}

#[test]
fn what_is_sent_right_before_closing_is_carried_out() {
    let ending = Some((Duration::from_micros(1), Ending::Close));
    let callers = vec![Behaviour { ending, ..flooder(Flood::Msg { length: 100 }) }; 100];
    let people = [lurker(Reading::Never), flooder(SHORT)];
    let mut simulation = Simulation::with(people.into_iter().chain(callers));
    // That all of it is carried out is checked when they leave.
    simulation.run(seconds(59));
    simulation.wind_down();
}

#[test]
fn a_closing_connection_keeps_its_slot_until_it_is_over() {
    let for_all = Options { max_clients: 1, ..options() };
    let for_one_address = Options { max_per_ip: Some(1), ..options() };
    for (limits, elsewhere) in [(for_all, "ERR full "), (for_one_address, "HELLO ")] {
        let mut session = Session::new(1, Conditions::default(), limits);
        let here = [10, 0, 0, 1];
        // Without output, and with output that is not taken.
        for (requests, there) in [(0, [10, 0, 0, 2]), (9_000, [10, 0, 0, 3])] {
            let requests = "LIST\n".repeat(requests);
            let ana = session.connect(here, &format!("NAME ana\n{requests}QUIT\n"));
            session.run(seconds(58));
            assert!(session.greeting(here).starts_with("ERR full "));
            assert!(session.greeting(there).starts_with(elsewhere));
            assert!(!ana.is_dropped());
            session.run(seconds(3));
            assert!(ana.is_dropped());
        }
        let ana = session.connect(here, "NAME ana\nQUIT\n");
        assert!(ana.sees_end() || !take_lines(ana).is_empty());
        ana.close();
        session.turn();
        assert!(session.greeting(here).starts_with("HELLO "));
    }
}

#[test]
fn a_closing_client_is_dropped_after_a_minute_whatever_it_takes() {
    for progress in [0, 1000] {
        let mut session = Session::new(1, Conditions::default(), options());
        let ana = session.connect([10, 0, 0, 1], "");
        let bob = session.connect([10, 0, 0, 2], "NAME bob\n");
        ana.send(&[&b"NAME ana\n"[..], &b"LIST\n".repeat(9_000), b"QUIT\n"].concat());
        session.run(seconds(1));
        while !take_lines(bob).iter().any(|line| line.starts_with("LEFT")) {
            ana.take(100, &mut Vec::new());
            session.run(MILLISECOND);
        }
        for second in 0..70 {
            assert_eq!(ana.is_dropped(), second >= 60, "after {second} seconds");
            ana.take(progress, &mut Vec::new());
            bob.send(b"MSG what others say is no progress\n");
            session.run(seconds(1));
        }
    }
}

#[test]
fn a_client_without_a_name_is_told_and_dropped() {
    let mut session = Session::new(1, Conditions::default(), options());
    let silent = session.connect([10, 0, 0, 1], "PING\n");
    session.run(seconds(59));
    assert_eq!(take_lines(silent).len(), 2);
    // At once, though the server has nothing else to wake up for.
    let greeted = silent.all_written().0;
    while silent.all_written().0 == greeted {
        session.turn();
    }
    assert!((seconds(60)..seconds(61)).contains(&os::time()), "told after {:?}", os::time());
    assert!(take_lines(silent)[0].starts_with("ERR timeout "));
    assert!(session.console.contains(" 10.0.0.1:1024 left (timeout)\n"));
    assert!(silent.sees_end() && !silent.is_dropped());
    session.run(seconds(60) + MILLISECOND);
    assert!(silent.is_dropped());
    // A connection that ends without a name is gone in the same turn.
    let shy = session.connect([10, 0, 0, 1], "");
    shy.half_close();
    session.turn();
    assert!(take_lines(shy)[0].starts_with("HELLO ") && shy.is_dropped());
}

#[test]
fn a_flood_of_pings_is_no_name() {
    let mut session = Session::new(1, COSTS, options());
    let nameless = arrive(Buffers::UNLIMITED, "");
    for _ in 0..61 {
        nameless.send(&b"PING\n".repeat(20_000));
        session.run(seconds(1));
    }
    assert!(take_lines(nameless).last().is_some_and(|line| line.starts_with("ERR timeout ")));
}

#[test]
fn a_reset_while_a_request_waits_is_reported_once() {
    let (mut session, [_, p2]) = behind(SOFT_LIMIT + 1);
    p2.send(msg(3900).repeat(40).as_bytes());
    session.run(MILLISECOND);
    p2.reset();
    let (end, mut turns) = (os::time() + seconds(1), 0);
    os::set_alarm(Some(end));
    while os::time() < end {
        session.turn();
        turns += 1;
        assert!(turns < 200, "in one second");
    }
}

#[test]
fn a_reset_while_closing_drops_at_once() {
    let mut session = Session::new(1, Conditions::default(), options());
    let ana =
        session.connect([10, 0, 0, 1], &format!("NAME ana\n{}QUIT\n", "LIST\n".repeat(9_000)));
    ana.send(&[b'x'; 100_000]);
    assert!(!ana.is_dropped());
    ana.reset();
    session.turn();
    assert!(ana.is_dropped());
}

// Accepting, the console, stopping

#[test]
fn a_failing_accept_delays_nobody_unless_the_reason_may_last() {
    use ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, OutOfMemory};
    let mut session = Session::new(1, Conditions::default(), options());
    os::fail_accept(&[ConnectionAborted, ConnectionReset, Interrupted]);
    assert!(session.greeting([10, 0, 0, 1]).starts_with("HELLO "));
    os::fail_accept(&[OutOfMemory; 4]);
    let before = os::calls().count;
    let ana = session.connect([10, 0, 0, 2], "");
    session.run(900 * MILLISECOND);
    let count = os::calls().count - before;
    assert!(take_lines(ana).is_empty() && count < 40, "{count} system calls in a second");
    session.run(seconds(1));
    assert!(take_lines(ana)[0].starts_with("HELLO "));
}

#[test]
fn a_limit_for_one_address_counts_a_network_of_ipv6() {
    let greeted = |max_per_ip, addresses: &mut dyn Iterator<Item = IpAddr>| {
        let mut session =
            Session::new(1, Conditions::default(), Options { max_per_ip, ..options() });
        addresses.filter(|&it| session.greeting(it).starts_with("HELLO ")).count()
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
fn a_refusal_tells_why_and_ends_when_somebody_leaves() {
    for (limits, text) in [
        (Options { max_per_ip: Some(1), ..options() }, "too many connections from your address"),
        (
            Options { max_clients: 1, ..options() },
            "no more connections can be taken now; try again later",
        ),
    ] {
        let mut session = Session::new(1, Conditions::default(), limits);
        let [ana, bob] = [(); 2].map(|()| session.connect([10, 0, 0, 1], ""));
        assert_eq!(take_lines(bob), [format!("ERR full {text}")]);
        assert!(bob.sees_end());
        assert!(session.console.contains(&format!("10.0.0.1:1024 refused: \"{text}\"")));
        ana.close();
        session.run(MILLISECOND);
        assert!(session.greeting([10, 0, 0, 1]).starts_with("HELLO "));
    }
}

#[test]
fn the_console_tells_every_ten_seconds_that_the_budget_applies() {
    let people = [steady(300_000, 65_536), flooder(Flood::Msg { length: 3000 })];
    let mut simulation = Simulation::with(people);
    simulation.run_until_limited();
    simulation.run(seconds(35));
    let told = simulation.session.console.split(" the budget applies: ").skip(1);
    let address = " KiB wait for 10.";
    let pending = told.map(|it| it.split_once(address).expect("a client").0.parse().expect("KiB"));
    let pending: Vec<usize> = pending.collect();
    assert!(matches!(pending[..], [256..400, _, _, ..]) && pending.len() <= 4, "{pending:?} KiB");
}

#[test]
fn a_stop_delivers_everything_though_clients_still_send() {
    let conditions = Conditions { partial: 20, ..Conditions::default() };
    let mut session = Session::new(1, conditions, options());
    let bob = session.connect([10, 0, 0, 1], "NAME bob\n");
    let names = ["p1", "p2", "p3"];
    let people = names.map(|name| session.connect([10, 0, 0, 2], &format!("NAME {name}\n")));
    bob.send(msg(3900).repeat(100).as_bytes());
    session.run(100 * MILLISECOND);
    os::signal();
    let mut received = [(); 3].map(|()| Vec::new());
    while !session.server.has_stopped() {
        for (peer, received) in people.iter().zip(&mut received) {
            peer.send(b"MSG I did not see it yet\n");
            // More than is read in one turn.
            peer.send(&[b'\n'; 20_000]);
            peer.take(20_000, received);
            if peer.sees_end() {
                peer.close();
            }
        }
        take_lines(bob);
        if bob.sees_end() {
            bob.close();
        }
        session.run(5 * MILLISECOND);
    }
    for received in received {
        let text = String::from_utf8(received).expect("UTF-8");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.iter().filter(|line| line.starts_with("MSG bob x")).count(), 100);
        assert!(lines.last().is_some_and(|line| line.starts_with("BYE ")), "{:?}", lines.last());
    }
    assert!(os::time() < seconds(1), "an end is not noticed");
}

#[test]
fn a_stop_waits_a_second_for_clients_that_do_not_read() {
    let (mut session, [_, p2]) = behind(SOFT_LIMIT + 1);
    // Requests that wait for the budget are not carried out any longer.
    p2.send(msg(3900).repeat(20).as_bytes());
    session.run(MILLISECOND);
    os::signal();
    let since = os::time();
    session.run(seconds(5));
    assert!(session.server.has_stopped());
    assert!((STOP_TIMEOUT..STOP_TIMEOUT + 10 * MILLISECOND).contains(&(os::time() - since)));
    assert!(take_lines(p2).last().is_some_and(|line| line.starts_with("BYE ")));
}
