//! The whole server in situations that are not left to chance: one for each promise of PROTOCOL.md,
//! "Delivery" and "Time-outs", and for each way in which an earlier server broke it. Where people of
//! a `Crowd` take part, all that simulation_tests.rs checks of everybody is checked here, too: that
//! nobody is removed against the promises, or misses or is told anything wrong.

use super::*;

/// What a small machine needs for a system call, and for moving bytes.
const COSTS: Conditions = Conditions {
    partial: 0,
    call_cost: Duration::from_nanos(3500),
    kib_cost: Duration::from_nanos(300),
    descriptors: usize::MAX,
};

fn flooder(request: Flood) -> Character {
    let role = Role::Flooder { request, pause: Duration::from_millis(1) };
    Character { role, has_long_name: true, ..Character::default() }
}

fn lurker(reading: Reading) -> Character {
    Character { role: Role::Talker { pause: seconds(1_000_000) }, reading, ..Character::default() }
}

fn steady(rate: usize, step: usize) -> Character {
    lurker(Reading::Steady { rate, step })
}

/// Types a short line now and then, and wants it passed on within `patience`.
fn typist(patience: Duration, pause: Duration) -> Character {
    let role = Role::Talker { pause };
    Character { role, patience: Some(patience), ..Character::default() }
}

/// Joins and quits, again and again.
fn restless() -> Character {
    let ending = Some((Duration::from_micros(1), Ending::Quit));
    Character { ending, comes_again: true, ..lurker(Reading::Eager) }
}

impl Simulation {
    fn add_all(&mut self, characters: impl IntoIterator<Item = Character>) {
        for character in characters {
            self.add(character);
        }
    }

    fn with(characters: impl IntoIterator<Item = Character>) -> Self {
        let mut simulation = Simulation::new(1, COSTS, options());
        simulation.add_all(characters);
        simulation
    }

    /// Runs until somebody is over the soft limit.
    fn run_until_limited(&mut self) {
        while !self.stage.server.flow.applies() {
            self.run(Duration::from_millis(10));
            assert!(os::time() < seconds(20), "nobody is ever over the soft limit");
        }
    }

    fn is_here(&self, id: usize) -> bool {
        self.crowd.borrow().log.room.contains(&id)
    }
}

#[test]
fn no_flood_removes_who_reads() {
    for flooders in [1, 3, 10] {
        let readers = [300_000, 1_250_000, 12_500_000].map(|rate| steady(rate, 65_536));
        let floods = vec![flooder(Flood::Msg { length: 0 }); flooders];
        let mut simulation = Simulation::with(readers.into_iter().chain(floods));
        simulation.run(seconds(5));
        assert!((1..=3).all(|id| simulation.is_here(id)));
        simulation.wind_down();
    }
}

#[test]
fn no_flood_of_private_messages_removes_its_victim() {
    for rate in [65_536, 1_250_000, 12_500_000] {
        let floods = vec![flooder(Flood::Priv { to: 1 }); 9];
        let mut simulation = Simulation::with([steady(rate, 65_536)].into_iter().chain(floods));
        simulation.run(seconds(1));
        assert!(simulation.is_here(1));
        simulation.wind_down();
    }
}

#[test]
fn no_flood_of_joins_and_quits_removes_who_reads() {
    let readers = vec![steady(300_000, 65_536); 97];
    let mut simulation = Simulation::with(readers.into_iter().chain(vec![restless(); 8]));
    simulation.run(seconds(5));
    assert!((1..=97).all(|id| simulation.is_here(id)));
    simulation.wind_down();
}

#[test]
fn no_crowd_of_lost_connections_removes_who_reads() {
    let ending = Some((seconds(1), Ending::Reset));
    let people = vec![Character { ending, ..lurker(Reading::Eager) }; 2000];
    let mut simulation = Simulation::with([steady(65_536, 1 << 20)].into_iter().chain(people));
    simulation.run(seconds(60));
    assert!(simulation.is_here(1));
    simulation.wind_down();
}

#[test]
fn whoever_takes_the_budget_in_steps_of_two_mebibytes_stays() {
    let buffers = Buffers { window: 4 << 20, step: 1 << 20, ..Buffers::default() };
    let reader = Character { buffers, ..steady(65_536, 2 << 20) };
    let mut simulation =
        Simulation::with([reader].into_iter().chain([flooder(Flood::Msg { length: 0 }); 4]));
    simulation.run(seconds(200));
    assert!(simulation.is_here(1));
    simulation.wind_down();
}

#[test]
fn who_does_not_read_is_removed_after_a_minute_and_who_reads_too_slowly_at_four_mebibytes() {
    let readers = [lurker(Reading::Never), steady(10_000, 1000)];
    let mut simulation =
        Simulation::with(readers.into_iter().chain([flooder(Flood::Msg { length: 0 }); 4]));
    simulation.run_until_limited();
    simulation.run(seconds(58));
    assert!(simulation.is_here(1) && simulation.is_here(2));
    simulation.run(seconds(4));
    assert!(!simulation.is_here(1) && simulation.is_here(2));
    while simulation.is_here(2) {
        assert!(os::time() < seconds(90));
        simulation.run(Duration::from_millis(10));
    }
    simulation.wind_down();
}

/// Bob, and somebody else who takes nothing and whose backlog is just so many bytes.
fn behind(bytes: usize) -> (Stage, [Peer; 2]) {
    let mut stage = Stage::new(1, Conditions::default(), options());
    let people = [1, 2].map(|at| stage.connect([10, 0, 0, at], &format!("NAME p{at}\n")));
    let overhead = "MSG p2 \r\n".len();
    loop {
        let missing = bytes - stage.server.room.delivery.backlog(0);
        let length = if missing > 2000 { 1000 } else { missing };
        people[1].send(format!("MSG {}\n", "x".repeat(length - overhead)).as_bytes());
        stage.run(Duration::from_millis(1));
        if length == missing {
            return (stage, people);
        }
    }
}

#[test]
fn limits_are_passed_by_the_first_byte_beyond_them() {
    assert!(behind(SOFT_LIMIT + 1).0.server.flow.applies());
    let (mut stage, [slow, _]) = behind(SOFT_LIMIT);
    assert!(!stage.server.flow.applies());
    for (backlog, is_dropped) in [(HARD_LIMIT, false), (HARD_LIMIT + 1, true)] {
        stage.server.note_backlog(0, backlog);
        assert_eq!(slow.is_dropped(), is_dropped);
    }
}

#[test]
fn who_takes_nothing_is_removed_after_a_minute_though_little_is_said() {
    let (mut stage, [slow, bob]) = behind(SOFT_LIMIT + 1);
    for second in 0..62 {
        assert_eq!(slow.is_dropped(), second >= 60, "after {second} seconds");
        bob.send(b"MSG x\n");
        stage.run(seconds(1));
    }
}

#[test]
fn who_reads_slowly_stays_when_nobody_speaks_any_more() {
    for rate in [5000, 12_000] {
        // The kernel's steps are of a minute's worth.
        let reader = steady(rate, rate * 59);
        let mut simulation = Simulation::with([reader, flooder(Flood::Msg { length: 1000 })]);
        while simulation.crowd.borrow().log.text.len() < 700_000 {
            simulation.turn();
        }
        simulation.crowd.borrow_mut().is_over = true;
        simulation.run(seconds(300));
        assert!(simulation.is_here(1));
    }
}

#[test]
fn while_somebody_is_behind_the_budget_is_kept_and_otherwise_nothing_is_limited() {
    let floods = [Flood::Msg { length: 0 }, Flood::Msg { length: 3000 }, Flood::Mixed].map(flooder);
    let people = [restless(), restless()].into_iter().chain(floods);
    let mut simulation = Simulation::with(people);
    simulation.run(Duration::from_millis(100));
    assert!(!simulation.stage.server.flow.applies());
    assert!(simulation.crowd.borrow().log.text.len() > 1_000_000, "nobody is limited");
    simulation.add(lurker(Reading::Never));
    simulation.run_until_limited();
    let since = os::time();
    simulation.crowd.borrow_mut().log.budget = Some(Bucket { since, ..Bucket::default() });
    let before = simulation.crowd.borrow().log.text.len();
    simulation.run(seconds(40));
    // Rosters grow while the names that cause them wait.
    let ending = Some((seconds(4), Ending::Close));
    let newcomer = Character { has_long_name: true, ending, ..lurker(Reading::Eager) };
    simulation.add_all(vec![newcomer; 90]);
    simulation.run(seconds(8));
    let most = simulation.crowd.borrow().log.budget.map_or(0.0, |bucket| bucket.most);
    assert!(most < 65_536.0 + 2.0 * 5200.0, "{most} bytes beyond 64 KiB a second");
    let all = simulation.crowd.borrow().log.text.len() - before;
    assert!(all > 46 * 65_536, "only {all} bytes in 48 seconds");
}

#[test]
fn while_somebody_is_behind_what_each_causes_is_spent_once() {
    let (mut stage, [_, bob]) = behind(SOFT_LIMIT + 1);
    let carol = stage.connect([10, 0, 0, 3], "NAME carol\n");
    stage.run(seconds(10));
    bob.send(b"MSG hello\n");
    carol.send(b"PRIV @p2 psst\nQUIT\n");
    let room = &stage.server.room;
    let costs = [
        room.cost(1, Request::Msg("hello")),
        room.cost(2, Request::Priv { to: "p2", text: "psst" }),
        room.cost_of_leaving(2, Reason::Quit),
    ];
    let full = os::now();
    stage.turn();
    assert!(take_lines(bob).last().is_some_and(|line| line.starts_with("USERS 2 ")));
    assert_eq!(stage.server.flow.paid_until - full, costs.map(time_for).iter().sum());
}

#[test]
fn while_somebody_is_behind_a_short_line_waits_for_less_than_half_a_second() {
    let talk = |length| flooder(Flood::Msg { length });
    for others in [talk(0), talk(3000), flooder(Flood::Priv { to: 1 }), restless()] {
        let typist = typist(Duration::from_millis(500), seconds(1));
        let mut simulation = Simulation::with([lurker(Reading::Never), typist, typist]);
        simulation.run(seconds(1));
        simulation.add_all(vec![others; 200]);
        simulation.run(seconds(5));
        assert!(simulation.stage.server.flow.applies());
    }
}

#[test]
fn while_nobody_is_behind_a_request_waits_for_a_few_turns() {
    // A turn's writes to 60 people take 0.8 ms, and 20 flooders take 16 ms to have a turn each.
    let (patience, pause) = (Duration::from_millis(4), Duration::from_millis(50));
    let talk = Flood::Msg { length: 0 };
    for (flooders, request) in [(1, talk), (20, talk), (20, Flood::List), (20, Flood::Mixed)] {
        let mut simulation = Simulation::with(vec![lurker(Reading::Eager); 30]);
        simulation.run(seconds(1));
        simulation.add_all(vec![flooder(request); flooders]);
        simulation.run(Duration::from_millis(30));
        simulation.add_all(vec![typist(patience, pause); 10]);
        simulation.run(Duration::from_millis(100));
    }
}

#[test]
fn who_asks_for_little_is_served_before_a_flood_of_one_who_came_first() {
    let mut stage = Stage::new(1, Conditions::default(), options());
    let [ana, bob] =
        ["ana", "bob"].map(|name| stage.connect([10, 0, 0, 1], &format!("NAME {name}\n")));
    ana.send(format!("MSG {}\n", "x".repeat(1000)).repeat(120).as_bytes());
    stage.turn();
    bob.send(b"PING\n");
    // In the first of these turns they are level.
    stage.turn();
    stage.turn();
    assert!(take_lines(bob).contains(&"PONG".to_owned()) && ana.unread() > 0);
}

#[test]
fn what_is_read_fills_a_turn_though_it_asks_for_nothing() {
    let mut stage = Stage::new(1, Conditions::default(), options());
    let people = [(); 20].map(|()| stage.connect([10, 0, 0, 1], ""));
    people.iter().for_each(|peer| peer.send(&[b'\n'; Server::READ_SHARE]));
    stage.turn();
    let read = people.iter().filter(|peer| peer.unread() == 0).count();
    assert_eq!(read * Server::READ_SHARE, Delivery::MAX_WORK);
}

#[test]
fn what_is_said_right_before_closing_is_carried_out() {
    let ending = Some((Duration::from_micros(1), Ending::Close));
    let callers = vec![Character { ending, ..flooder(Flood::Msg { length: 100 }) }; 100];
    let people = [lurker(Reading::Never), flooder(Flood::Msg { length: 0 })];
    let mut simulation = Simulation::with(people.into_iter().chain(callers));
    // That all of it is carried out is checked when they leave.
    simulation.run(seconds(59));
    simulation.wind_down();
}

#[test]
fn requests_go_on_when_replies_are_taken_though_a_backlog_of_events_stays() {
    let mut stage = Stage::new(1, Conditions::default(), options());
    let ana = stage.connect([10, 0, 0, 1], "NAME ana\n");
    let bob = stage.connect([10, 0, 0, 2], "NAME bob\n");
    // More replies than may wait, then events behind them, and one more request.
    ana.send(&b"PING 0123456789012345678901234567890123456789\n".repeat(4000));
    stage.run(seconds(1));
    for _ in 0..20 {
        bob.send(format!("MSG {}\n", "x".repeat(3900)).repeat(10).as_bytes());
        stage.run(Duration::from_millis(1));
    }
    ana.send(b"MSG still here\n");
    stage.run(seconds(1));
    assert!(!take_lines(bob).contains(&"MSG ana still here".to_owned()));
    for _ in 0..300_000 / 1000 {
        ana.take(1000, &mut Vec::new());
        stage.run(Duration::from_millis(1));
    }
    assert!(take_lines(bob).contains(&"MSG ana still here".to_owned()));
}

#[test]
fn a_closing_connection_has_its_place_until_it_is_over() {
    let for_all = Options { max_clients: 2, ..options() };
    let for_one_address = Options { max_per_ip: Some(2), ..options() };
    for (limits, elsewhere) in [(for_all, "ERR full "), (for_one_address, "HELLO ")] {
        let mut stage = Stage::new(1, Conditions::default(), limits);
        let (here, there) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        let ana = stage.connect(here, "NAME ana\n");
        ana.send(&[&b"LIST\n".repeat(9_000)[..], b"QUIT\n"].concat());
        // Whoever has quit and got all makes room for the next, though they do not end their side.
        for _ in 0..60 {
            let bob = stage.connect(here, "NAME bob\nQUIT\n");
            assert!(take_lines(bob).last().is_some_and(|line| line.starts_with("BYE ")));
            assert_eq!(os::descriptors(), 3, "ana's, bob's and the reserve");
        }
        // Ana has quit, too, and does not take what she is owed.
        assert!(stage.greeting(here).starts_with("HELLO "));
        stage.run(seconds(8));
        assert!(stage.greeting(here).starts_with("ERR full "));
        assert!(stage.greeting(there).starts_with(elsewhere));
        assert!(!ana.is_dropped());
        stage.run(seconds(2));
        assert!(ana.is_dropped());
        assert!(stage.greeting(here).starts_with("HELLO "));
    }
}

#[test]
fn closing_has_ten_seconds_without_progress_and_a_minute_in_all() {
    for (progress, dropped) in [(0, 10), (1000, 60)] {
        let mut stage = Stage::new(1, Conditions::default(), options());
        let ana = stage.connect([10, 0, 0, 1], "");
        let bob = stage.connect([10, 0, 0, 2], "NAME bob\n");
        ana.send(&[&b"NAME ana\n"[..], &b"LIST\n".repeat(9_000), b"QUIT\n"].concat());
        stage.run(seconds(1));
        while !take_lines(bob).iter().any(|line| line.starts_with("LEFT")) {
            ana.take(100, &mut Vec::new());
            stage.run(Duration::from_millis(1));
        }
        for second in 0..70 {
            assert_eq!(ana.is_dropped(), second >= dropped, "after {second} seconds");
            ana.take(progress, &mut Vec::new());
            bob.send(b"MSG what others say is no progress\n");
            stage.run(seconds(1));
        }
    }
}

#[test]
fn who_gives_no_name_is_told_and_dropped() {
    let mut stage = Stage::new(1, Conditions::default(), options());
    let silent = stage.connect([10, 0, 0, 1], "PING\n");
    stage.run(seconds(59));
    assert_eq!(take_lines(silent).len(), 2);
    // At once, though the server has nothing else to wake up for.
    let greeted = silent.all_written().0;
    while silent.all_written().0 == greeted {
        stage.turn();
    }
    assert!((seconds(60)..seconds(61)).contains(&os::time()), "told after {:?}", os::time());
    assert!(take_lines(silent)[0].starts_with("ERR timeout "));
    assert!(silent.sees_end() && !silent.is_dropped());
    stage.run(seconds(10));
    assert!(silent.is_dropped());
    // Who ends without a name is gone in the same turn.
    let shy = stage.connect([10, 0, 0, 1], "");
    shy.half_close();
    stage.turn();
    assert!(take_lines(shy)[0].starts_with("HELLO ") && shy.is_dropped());
}

#[test]
fn whoever_is_lost_is_announced_as_the_budget_allows() {
    let neighbour = Character { has_long_name: true, ..lurker(Reading::Eager) };
    for ending in [Ending::Reset, Ending::HalfClose, Ending::Quit] {
        let talk = flooder(Flood::Msg { length: 0 });
        let mut simulation = Simulation::with([lurker(Reading::Never), talk]);
        simulation.add_all(vec![neighbour; 90]);
        simulation.run_until_limited();
        let since = os::time();
        simulation.crowd.borrow_mut().log.budget = Some(Bucket { since, ..Bucket::default() });
        (3..=92).for_each(|id| simulation.crowd.borrow_mut().end(id, ending));
        simulation.run(seconds(1));
        // Ninety rosters have 200 KB.
        assert!((3..=92).any(|id| simulation.is_here(id)), "all are announced within a second");
        simulation.run(seconds(10));
        assert!(!(3..=92).any(|id| simulation.is_here(id)));
        let most = simulation.crowd.borrow().log.budget.map_or(0.0, |bucket| bucket.most);
        assert!(most < 65_536.0 + 5200.0, "{most} bytes beyond 64 KiB a second");
    }
}

#[test]
fn who_is_lost_while_a_request_waits_is_reported_once() {
    let (mut stage, [_, bob]) = behind(SOFT_LIMIT + 1);
    bob.send(format!("MSG {}\n", "x".repeat(3900)).repeat(40).as_bytes());
    stage.run(Duration::from_millis(1));
    bob.reset();
    let (end, mut turns) = (os::time() + seconds(1), 0);
    os::set_alarm(Some(end));
    while os::time() < end {
        stage.turn();
        turns += 1;
        assert!(turns < 200, "in one second");
    }
}

#[test]
fn who_is_lost_when_nothing_that_they_sent_counts_any_more_is_dropped_at_once() {
    let (mut stage, [_, bob]) = behind(SOFT_LIMIT + 1);
    let [leaving, closing] =
        [3, 4].map(|at| stage.connect([10, 0, 0, at], &format!("NAME p{at}\n")));
    closing.send(&[&b"LIST\n".repeat(6000)[..], b"QUIT\n"].concat());
    stage.run(Duration::from_millis(1));
    bob.send(format!("MSG {}\n", "x".repeat(3900)).repeat(40).as_bytes());
    stage.run(Duration::from_millis(1));
    leaving.half_close();
    stage.run(Duration::from_millis(1));
    closing.send(&[b'x'; 100_000]);
    for lost in [closing, leaving] {
        assert!(!lost.is_dropped());
        lost.reset();
        stage.run(Duration::from_millis(1));
        assert!(lost.is_dropped());
    }
    assert!(stage.server.room.is_named(2) && !stage.server.room.is_named(3));
}

#[test]
fn a_name_that_waits_for_the_budget_came_in_time() {
    let options = Options { name_timeout: seconds(1), ..options() };
    let mut simulation = Simulation::new(1, COSTS, options);
    simulation.add_all([lurker(Reading::Never), flooder(Flood::Msg { length: 0 })]);
    simulation.run_until_limited();
    let newcomer = Character { has_long_name: true, ..lurker(Reading::Eager) };
    simulation.add_all(vec![newcomer; 90]);
    simulation.run(seconds(1));
    assert!(!(3..=92).all(|id| simulation.is_here(id)), "somebody waits for longer than that");
    simulation.run(seconds(15));
    assert!((3..=92).all(|id| simulation.is_here(id)));
}

#[test]
fn a_refusal_without_descriptors_takes_few_system_calls() {
    let conditions = Conditions { descriptors: 3, ..Conditions::default() };
    let mut stage = Stage::new(1, conditions, options());
    let people = [1, 2].map(|at| stage.connect([10, 0, 0, at], "NAME p\n"));
    let before = os::calls().count;
    (0..10).for_each(|at| assert!(stage.greeting([10, 0, 1, at]).starts_with("ERR full ")));
    let count = os::calls().count - before;
    assert!(count <= 100, "{count} system calls for ten refusals");
    people[0].close();
    stage.run(seconds(1));
    assert!(stage.greeting([10, 0, 2, 1]).starts_with("HELLO "));
}

#[test]
fn without_even_a_spare_descriptor_the_listener_rests() {
    let mut stage = Stage::new(1, Conditions { descriptors: 0, ..COSTS }, options());
    stage.connect([10, 0, 0, 1], "");
    let before = os::calls().count;
    stage.run(seconds(10));
    let count = os::calls().count - before;
    assert!((40..400).contains(&count), "{count} system calls in ten seconds");
}

#[test]
fn a_newcomer_that_is_gone_delays_nobody_and_what_may_last_makes_the_listener_rest() {
    use ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, OutOfMemory};
    let mut stage = Stage::new(1, Conditions::default(), options());
    os::fail_accept(&[ConnectionAborted, ConnectionReset, Interrupted]);
    assert!(stage.greeting([10, 0, 0, 1]).starts_with("HELLO "));
    os::fail_accept(&[OutOfMemory]);
    let ana = stage.connect([10, 0, 0, 2], "");
    assert!(take_lines(ana).is_empty());
    stage.run(seconds(1));
    assert!(take_lines(ana)[0].starts_with("HELLO "));
}

#[test]
fn a_limit_for_one_address_counts_a_network_of_ipv6() {
    let greeted = |max_per_ip, addresses: &mut dyn Iterator<Item = IpAddr>| {
        let mut stage = Stage::new(1, Conditions::default(), Options { max_per_ip, ..options() });
        addresses.filter(|&it| stage.greeting(it).starts_with("HELLO ")).count()
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
fn one_too_many_from_an_address_is_told_so_until_somebody_leaves() {
    let limit = Options { max_per_ip: Some(1), ..options() };
    let mut stage = Stage::new(1, Conditions::default(), limit);
    // Somebody else's connection that only waits for its client's end does not make room.
    stage.connect([10, 0, 0, 2], "QUIT\n");
    let [ana, bob] = [(); 2].map(|()| stage.connect([10, 0, 0, 1], ""));
    assert!(take_lines(bob)[0].starts_with("ERR full ") && bob.sees_end());
    assert!(stage.console.contains("10.0.0.1:1024 refused (too many from there)"));
    ana.close();
    stage.run(Duration::from_millis(1));
    assert!(stage.greeting([10, 0, 0, 1]).starts_with("HELLO "));
}

#[test]
fn the_console_tells_when_the_budget_begins_and_ends() {
    let people = [steady(300_000, 65_536), flooder(Flood::Msg { length: 3000 })];
    let mut simulation = Simulation::with(people);
    simulation.run_until_limited();
    let console = &simulation.stage.console;
    let begins = console.split(" the budget begins to apply: p1 has not taken ").skip(1);
    let backlogs: Vec<usize> =
        begins.map(|it| it.split_once(" KiB\n").unwrap().0.parse().unwrap()).collect();
    assert!(matches!(backlogs[..], [256..300]), "{backlogs:?} KiB");
    simulation.crowd.borrow_mut().is_over = true;
    while simulation.stage.server.flow.applies() {
        simulation.turn();
    }
    let since = os::time();
    while !simulation.stage.console.contains(" the budget ceases to apply\n") {
        simulation.turn();
    }
    let pause = os::time() - since;
    assert!((seconds(9)..seconds(11)).contains(&pause), "told after {pause:?}");
}

#[test]
fn a_status_counts_everybody_by_what_they_do() {
    let (mut stage, [_, bob]) = behind(SOFT_LIMIT + 1);
    stage.connect([10, 0, 0, 3], "");
    for at in [4, 5] {
        stage.connect([10, 0, 0, at], "QUIT\n");
    }
    // More than a second's budget.
    bob.send(format!("MSG {}\n", "x".repeat(3900)).repeat(20).as_bytes());
    stage.run(Duration::from_millis(1));
    os::signal(Signal::Status);
    stage.run(Duration::from_millis(1));
    let status = stage.console.rsplit_once(" status: ").expect("a status").1;
    let counts = "3 open, 2 named, 2 closing, 1 over the soft limit, 1 waiting, 0 lines dropped, ";
    assert!(status.starts_with(counts), "{status}");
}

#[test]
fn at_a_stop_everybody_gets_all_and_the_end_though_they_still_send() {
    let mut stage = Stage::new(1, Conditions { partial: 20, ..Conditions::default() }, options());
    let bob = stage.connect([10, 0, 0, 1], "NAME bob\n");
    let names = ["p1", "p2", "p3"];
    let people = names.map(|name| stage.connect([10, 0, 0, 2], &format!("NAME {name}\n")));
    bob.send(format!("MSG {}\n", "x".repeat(3900)).repeat(100).as_bytes());
    stage.run(Duration::from_millis(100));
    os::signal(Signal::Stop);
    let mut received = [(); 3].map(|()| Vec::new());
    while !stage.server.has_stopped() {
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
        stage.run(Duration::from_millis(5));
    }
    for received in received {
        let text = String::from_utf8(received).expect("UTF-8");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.iter().filter(|line| line.starts_with("MSG bob x")).count(), 100);
        assert!(lines.last().is_some_and(|line| line.starts_with("BYE ")), "{:?}", lines.last());
    }
    assert!(os::time() < seconds(1), "somebody's end is not noticed");
}

#[test]
fn at_a_stop_who_is_gone_is_neither_announced_nor_waited_for() {
    let (mut stage, [slow, bob]) = behind(SOFT_LIMIT + 1);
    let lost = stage.connect([10, 0, 0, 3], "NAME p3\n");
    bob.send(format!("MSG {}\n", "x".repeat(3900)).repeat(20).as_bytes());
    stage.run(Duration::from_millis(1));
    lost.reset();
    stage.run(Duration::from_millis(1));
    assert!(lost.is_dropped() && stage.server.room.is_named(2), "its leave waits for the budget");
    let since = os::time();
    os::signal(Signal::Stop);
    while !stage.server.has_stopped() {
        for peer in [slow, bob] {
            assert!(!take_lines(peer).iter().any(|line| line.starts_with("LEFT")));
            if peer.sees_end() {
                peer.close();
            }
        }
        stage.run(Duration::from_millis(1));
    }
    assert!(os::time() - since < STOP_TIMEOUT);
}

#[test]
fn whoever_sends_more_than_is_read_at_once_makes_the_next_turn_short() {
    let mut stage = Stage::new(1, Conditions::default(), options());
    let ana = stage.connect([10, 0, 0, 1], "");
    for (bytes, is_short) in [(1, false), (Server::READ_SHARE, true), (1, false)] {
        ana.send(&vec![b'\n'; bytes]);
        stage.turn();
        assert_eq!(stage.server.room.delivery.is_flooded, is_short, "{bytes} bytes");
    }
}
