//! Hostile, unlucky and slow peers against the real server, on the real operating system: what takes
//! more than a transcript can say, and what the simulated network of scenarios.rs cannot show. Every
//! test starts a server of its own on a free port. If something must not happen, a PING that is
//! answered shows that it has not.
//!
//!     cargo test --release --test stress
//!     cargo test --release --test stress -- --ignored    what needs root and a minute

// It looks into /proc, and takes the network apart.
#![cfg(target_os = "linux")]

mod history;
mod person;
#[path = "../suite/process.rs"]
mod process;

use history::{History, Received};
use person::Person;
use process::{descriptor_limit, processor_time, signal, Server, STUCK};
use std::fs;
use std::io::{self, Write};
use std::net::Shutdown;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_linechat-server");

fn start(options: &str) -> Server {
    let options: Vec<_> = options.split_whitespace().map(str::to_owned).collect();
    Server::start(&options).expect("the server starts")
}

/// A server that is started by the shell: `$0` is the program, `$1` a free port of 127.0.0.1.
fn start_by(script: &str) -> Server {
    Server::start_as(Command::new("sh").args(["-c", script, PROGRAM])).expect("the server starts")
}

/// Opens connections, each of which the server takes.
fn connect(address: &str, count: usize) -> Vec<Person> {
    let mut people: Vec<_> = (0..count).map(|_| Person::connect(address)).collect();
    assert!(people.iter_mut().all(|person| !person.is_refused()));
    people
}

/// Connects clients that then join all at once, with this name and a number after it.
fn crowd(server: &Server, count: usize, name: &str) -> Vec<Person> {
    let mut crowd = connect(&server.address, count);
    for (number, person) in crowd.iter_mut().enumerate() {
        person.say(&format!("NAME {name}{number}"));
    }
    crowd.iter_mut().for_each(|person| drop(person.until("WELCOME ")));
    crowd
}

/// Sends `count` messages: each is its number and `length` bytes.
fn talk(person: &mut Person, count: usize, length: usize) {
    let text = "x".repeat(length);
    (0..count).for_each(|number| person.say(&format!("MSG {number} {text}")));
}

fn send(server: &Server, name: &str) {
    signal(server.child.id(), name).expect("a signal is sent");
}

/// The server is suspended meanwhile, so that it finds everything at once.
fn at_once(server: &Server, action: impl FnOnce()) {
    send(server, "STOP");
    action();
    send(server, "CONT");
}

/// Repeats a step until it returns true.
fn wait_until(mut step: impl FnMut() -> bool) {
    let since = Instant::now();
    while !step() {
        assert!(since.elapsed() < STUCK, "nothing changes any more");
    }
}

/// A path of this test's own, where nothing is yet.
fn scratch(test: &str) -> PathBuf {
    std::env::temp_dir().join(format!("linechat-{test}-{}", std::process::id()))
}

/// Lets time pass, to see that nothing happens.
fn idle(time: Duration) {
    let (reader, _writer) = std::os::unix::net::UnixStream::pair().expect("a pair");
    reader.set_read_timeout(Some(time)).expect("a time-out");
    let _ = io::Read::read(&mut &reader, &mut [0]);
}

#[test]
fn the_last_line_before_a_reset_is_carried_out_once() {
    let server = start("");
    let mut ana = Person::join(&server.address, "ana");
    let mut talkers = crowd(&server, 6, "t");
    let open = server.descriptors().len();
    let flood = format!("MSG {}\n", "x".repeat(3900)).repeat(16);
    let mut history = History::default();
    let mut received: Vec<_> = (0..6).map(|it| Received::new(&format!("t{it}"))).collect();
    for round in 0..10 {
        let passing: Vec<_> =
            (0..20).map(|it| Person::join(&server.address, &format!("p{round}.{it}"))).collect();
        // The talkers send more than is delivered in one turn. So the server writes to those who pass
        // before it reads their last line; and Linux resets a connection that is closed with something
        // unread.
        at_once(&server, || {
            talkers.iter_mut().for_each(|talker| talker.say(&flood));
            passing.into_iter().for_each(|mut person| person.say("MSG last words"));
        });
        wait_until(|| {
            let lines: Vec<_> = talkers.iter_mut().map(Person::fence).collect();
            ana.fence().iter().for_each(|line| history.push(line));
            for (received, lines) in received.iter_mut().zip(lines) {
                lines.iter().for_each(|line| received.line(line, &history));
            }
            history.members.values().filter(|it| it.left.is_none()).count() == talkers.len()
        });
    }
    let passed = history.members.iter().filter(|(name, _)| name.starts_with('p'));
    let said: Vec<_> = passed.map(|(_, it)| (it.said.len(), it.left.is_some())).collect();
    assert_eq!(said, [(1, true); 200]);
    assert_eq!(server.descriptors().len(), open);
}

#[test]
fn without_descriptors_the_listener_rests_and_recovers() {
    let server = start("");
    let mut ana = Person::join(&server.address, "ana");
    let bob = Person::join(&server.address, "bob");
    ana.until("JOINED bob");
    // The limit is on the numbers of descriptors, so the gaps are filled first.
    let open = server.descriptors();
    let limit = open.iter().max().expect("some") + 1;
    let _fillers = connect(&server.address, limit - open.len());
    let mut prlimit = Command::new("prlimit");
    prlimit.args(["--pid", &server.child.id().to_string(), &format!("--nofile={limit}:{limit}")]);
    assert!(prlimit.status().expect("prlimit").success());
    let mut next = Person::connect(&server.address);
    ana.fence();
    let before = processor_time(server.child.id());
    idle(Duration::from_millis(500));
    let used = processor_time(server.child.id()) - before;
    assert!(used < Duration::from_millis(50), "{used:?} of 500 ms idle");
    bob.leave();
    ana.until("LEFT bob");
    assert!(!next.is_refused());
}

#[test]
fn slots_are_fewer_than_descriptors() {
    // The soft limit on open files is raised to the hard one.
    let server = start_by("ulimit -S -n 20; ulimit -H -n 60; exec \"$0\" \"$1\"");
    let mut people = Vec::new();
    loop {
        let mut person = Person::connect(&server.address);
        match person.is_refused() {
            true => break assert!(person.ends()),
            false => people.push(person),
        }
    }
    assert!((30..60).contains(&people.len()), "{} clients", people.len());
    // No client could be served.
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 8; exec \"$0\" 127.0.0.1:0", PROGRAM]);
    let output = command.output().expect("runs");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.stdout, output.status.code()), (Vec::new(), Some(1)), "{complaint}");
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
    assert!(complaint.contains("ulimit -n"), "{complaint}");
}

#[test]
fn connections_without_a_name_cost_little_memory() {
    let server = start("");
    let many = (descriptor_limit() / 3).min(5000);
    let before = server.memory();
    let mut silent = connect(&server.address, many);
    for person in silent.iter_mut().step_by(2) {
        person.socket().write_all(b"N").expect("takes a byte");
    }
    Person::join(&server.address, "ana").fence();
    let each = (server.memory() - before) / many;
    assert!(each < 2000, "{each} bytes for each");
}

#[test]
fn a_reset_at_any_moment_ends_only_that_connection() {
    let server = start("");
    let mut ana = Person::join(&server.address, "ana");
    for round in 0..200 {
        // Linux resets a connection that is closed with something unread.
        let mut victim = Person::connect(&server.address);
        if round % 4 > 0 {
            victim.say(&format!("NAME victim{round}"));
        }
        if round % 4 > 1 {
            victim.until("WELCOME");
            ana.say(&format!("PRIV @victim{round} x"));
            ana.say("MSG to all");
        }
        if round % 4 > 2 {
            victim.say("QUIT");
        }
        drop(victim);
        ana.say(&format!("PRIV @victim{round} still there?"));
    }
    // All are gone, and the count is right again.
    wait_until(|| ana.count().0 == 1 && server.descriptors().len() < 20);
}

/// The next line of the console in which all of these words stand.
fn shown(server: &mut Server, words: &[&str]) -> String {
    loop {
        let line = server.next_line().expect("the console goes on");
        let line = line.unwrap_or_else(|| panic!("the console ends without {words:?}"));
        if words.iter().all(|word| line.contains(word)) {
            return line;
        }
    }
}

#[test]
fn a_console_that_nobody_reads_does_not_stop_the_chat() {
    // What `server` does not ask for stays in the pipe.
    let mut server = start("--verbose");
    let mut talker = Person::join(&server.address, "ana");
    // More than a pipe holds, and less than the server keeps: all of it is shown when there is
    // somebody to read, though nothing else happens.
    talk(&mut talker, 40, 3000);
    talker.fence();
    (0..40).for_each(|number| drop(shown(&mut server, &[&format!("ana: {number} x")])));
    // Ten times what both hold together.
    talk(&mut talker, 400, 3000);
    talker.fence();
}

#[test]
fn a_console_that_goes_away_does_not_stop_the_chat() {
    let pipe = scratch("pipe");
    // head(1) shows where the server listens, and ends.
    let script = "mkfifo {pipe}; head -n 1 {pipe} & exec \"$0\" --verbose \"$1\" >{pipe}";
    let mut server = start_by(&script.replace("{pipe}", &pipe.display().to_string()));
    fs::remove_file(&pipe).expect("removes");
    let mut talker = Person::join(&server.address, "ana");
    for _ in 0..100 {
        talker.say("MSG nobody sees this");
        talker.fence();
    }
    assert!(server.child.try_wait().expect("a status").is_none());
}

#[test]
fn a_console_that_is_a_file_gets_every_line() {
    let file = scratch("console");
    // The shell shows the first line, which says where the server listens.
    let script = ": >{file}; (until read -r line; do :; done; echo \"$line\") <{file} & \
                  exec \"$0\" \"$1\" >{file}";
    let mut server = start_by(&script.replace("{file}", &file.display().to_string()));
    let many = (descriptor_limit() / 3).min(3000);
    let crowd = crowd(&server, many, "p");
    let mut ana = Person::join(&server.address, "ana");
    // They leave all at once: in one turn.
    at_once(&server, || drop(crowd));
    while !ana.until("LEFT ").ends_with(" 1 disconnected") {}
    send(&server, "TERM");
    server.child.wait().expect("ended");
    let shown = fs::read_to_string(&file).expect("reads");
    fs::remove_file(&file).expect("removes");
    let left = shown.lines().filter(|line| line.contains(" left (disconnected)")).count();
    assert_eq!((left, shown.contains("dropped")), (many, false));
}

#[test]
fn a_stop_delivers_what_was_accepted() {
    let mut server = start("");
    let mut bob = Person::join(&server.address, "bob");
    let mut ana = Person::join(&server.address, "ana");
    bob.fence();
    talk(&mut ana, 500, 1000);
    ana.fence();
    send(&server, "HUP");
    send(&server, "PIPE");
    ana.fence();
    send(&server, "TERM");
    for number in 0..500 {
        assert!(bob.line().starts_with(&format!("MSG ana {number} x")));
    }
    assert!(bob.line().starts_with("BYE "));
    assert!(bob.ends());
    assert!(ana.line().starts_with("BYE "));
    assert!(ana.ends());
    assert_eq!(server.child.wait().expect("ended").code(), Some(0));
    // The port can be used again at once, though connections on it have just been closed.
    start_by(&format!("exec \"$0\" {}", server.address));
}

#[test]
fn a_stop_in_the_middle_of_a_turn_takes_little_memory() {
    let server = start("");
    let many = (descriptor_limit() / 3).min(1500);
    let mut crowd = crowd(&server, many, "p");
    let before = server.peak_memory();
    // The server finds all of this, and then the request to stop, when it goes on.
    at_once(&server, || {
        crowd[..3].iter_mut().for_each(|person| talk(person, 16, 3900));
        send(&server, "TERM");
    });
    // The kernel shows no memory of a process that has ended.
    let mut most = before;
    while let now @ 1.. = server.peak_memory() {
        most = most.max(now);
    }
    let more = (most - before) >> 20;
    assert!(more < 64, "{more} MiB to stop while 180 KiB are pending for each of {many}");
}

#[test]
fn a_second_signal_stops_at_once() {
    let mut server = start("");
    let mut lazy = Person::join(&server.address, "lazy");
    let mut ana = Person::join(&server.address, "ana");
    // Lazy takes less than is sent to it, so that the stop has to wait.
    let text = "x".repeat(3900);
    for _ in 0..130 {
        ana.say(&format!("PRIV @lazy {text}"));
        ana.until("SENT");
    }
    send(&server, "TERM");
    assert!(ana.line().starts_with("BYE "));
    send(&server, "TERM");
    let status = server.child.wait().expect("ended");
    assert_eq!(status.code(), Some(128 + 15));
    lazy.socket().shutdown(Shutdown::Both).expect("ends");
}

/// A peer whose network goes away without a word: in a network namespace of its own, whose link
/// is taken down.
#[test]
#[ignore = "needs root and iproute2, and takes a minute"]
fn a_vanished_peer_is_announced() {
    let id = std::process::id();
    let (space, inner, outer) = (format!("linechat-{id}"), format!("lci{id}"), format!("lco{id}"));
    let ip = |line: String| {
        let status = Command::new("ip").args(line.split(' ')).status();
        status.is_ok_and(|status| status.success())
    };
    assert!(ip(format!("netns add {space}")), "cannot make a network namespace");
    let made = ip(format!("link add {outer} type veth peer name {inner} netns {space}"))
        && ip(format!("addr add 10.213.7.1/30 dev {outer}"))
        && ip(format!("link set {outer} up"))
        && ip(format!("-n {space} addr add 10.213.7.2/30 dev {inner}"))
        && ip(format!("-n {space} link set {inner} up"));
    assert!(made, "cannot make a link");
    let server = start_by("exec \"$0\" 10.213.7.1:0");
    let mut ana = Person::join(&server.address, "ana");
    ana.socket().set_read_timeout(Some(Duration::from_secs(75))).expect("a time-out");
    // Idle is idle when the link goes down; to busy something is on its way.
    let mut peers = ["idle", "busy"].map(|name| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &space, "nc"]).args(server.address.split(':'));
        let mut peer = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("starts");
        let typed = peer.stdin.as_mut().expect("a pipe");
        writeln!(typed, "NAME {name}").expect("takes a line");
        ana.until(&format!("JOINED {name}"));
        peer
    });
    assert!(ip(format!("link set {outer} down")));
    ana.say("PRIV @busy are you there?");
    let begun = Instant::now();
    let mut gone = [ana.until("LEFT "), ana.until("LEFT ")];
    println!("both were announced after {:?}", begun.elapsed());
    gone.sort();
    assert!(gone[0].starts_with("LEFT busy ") && gone[0].ends_with(" disconnected"));
    assert!(gone[1].starts_with("LEFT idle ") && gone[1].ends_with(" disconnected"));
    for peer in &mut peers {
        peer.kill().expect("ends");
        peer.wait().expect("ended");
    }
    ip(format!("link del {outer}"));
    ip(format!("netns del {space}"));
}

#[test]
fn errors_are_one_line_and_an_exit_status() {
    let run = |arguments: &[&str]| {
        let output = Command::new(PROGRAM).args(arguments).output().expect("runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (status, complaint) = run(&["--nonsense"]);
    assert_eq!((status, complaint.lines().count()), (Some(2), 1));
    let server = start("");
    let (status, complaint) = run(&[&server.address]);
    assert_eq!((status, complaint.lines().count()), (Some(1), 1));
    let port = server.address.rsplit(':').next().expect("a port");
    assert!(complaint.contains(port) && complaint.contains("another server"), "{complaint}");
}
