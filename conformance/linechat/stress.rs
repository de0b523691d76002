//! Hostile, unlucky and slow peers against the real server, on the real operating system: what takes
//! more than a transcript can say, and what the simulated network of scenarios.rs cannot show. Every
//! test starts a server of its own on a free port. Where something must not happen, a PING that is
//! answered shows that it has not; no test has a limit of time.
//!
//!     cargo test --release --test stress
//!     cargo test --release --test stress -- --ignored    what needs root and a minute

// It looks into /proc, and takes the network apart.
#![cfg(target_os = "linux")]

mod person;
#[path = "../suite/process.rs"]
mod process;

use person::Person;
use process::{descriptor_limit, processor_time, signal, Server};
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
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

/// So many connections, each of which the server takes.
fn connect(address: &str, count: usize) -> Vec<Person> {
    let mut people: Vec<_> = (0..count).map(|_| Person::connect(address)).collect();
    assert!(people.iter_mut().all(|person| !person.is_refused()));
    people
}

/// So many who join, all at once, and have these names with a number behind.
fn crowd(server: &Server, count: usize, name: &str) -> Vec<Person> {
    let mut crowd = connect(&server.address, count);
    for (number, person) in crowd.iter_mut().enumerate() {
        person.say(&format!("NAME {name}{number}"));
    }
    crowd.iter_mut().for_each(|person| drop(person.until("WELCOME ")));
    crowd
}

/// Somebody says so many messages, each with its number and so many bytes more.
fn talk(person: &mut Person, count: usize, length: usize) {
    let text = "x".repeat(length);
    (0..count).for_each(|number| person.say(&format!("MSG {number} {text}")));
}

fn send(server: &Server, name: &str) {
    signal(server.child.id(), name).expect("a signal is sent");
}

/// The server finds all that is done here at once.
fn at_once(server: &Server, action: impl FnOnce()) {
    send(server, "STOP");
    action();
    send(server, "CONT");
}

/// A file or folder of this test's own, of which nothing is there yet.
fn scratch(test: &str) -> PathBuf {
    std::env::temp_dir().join(format!("linechat-{test}-{}", std::process::id()))
}

/// Lets time pass for what only time can show: that nothing happens.
fn idle(time: Duration) {
    let (reader, _writer) = std::os::unix::net::UnixStream::pair().expect("a pair");
    reader.set_read_timeout(Some(time)).expect("a time-out");
    let _ = io::Read::read(&mut &reader, &mut [0]);
}

#[test]
fn requests_wait_while_their_replies_do() {
    let people = (descriptor_limit() / 3).min(5000) - 1;
    let server = start("");
    let mut crowd = crowd(&server, people, "somebody-with-a-rather-long-name-");
    let mut greedy = Person::join(&server.address, "greedy");
    greedy.fence();
    let before = server.memory();
    let mut writer = greedy.voice();
    let requests = 100_000;
    let asking = thread::spawn(move || {
        for _ in 0..requests / 1000 {
            writer.write_all("LIST\n".repeat(1000).as_bytes())?;
        }
        writer.flush()
    });
    // Others are served as before, and the server's memory does not grow with the requests.
    let other = crowd.last_mut().expect("a crowd");
    let mut most = 0;
    for _ in 0..200 {
        other.fence();
        most = most.max(server.memory());
    }
    assert!(most - before < 8 * 1024 * 1024, "{} KiB more", (most - before) >> 10);
    // When it reads, it gets its replies: in each roster all the names.
    for _ in 0..3 {
        let mut names = 0;
        while names < people + 1 {
            names += greedy.until("USERS ").split(' ').skip(2).count();
        }
        assert_eq!(names, people + 1);
    }
    greedy.socket().shutdown(Shutdown::Both).expect("ends");
    let _ = asking.join();
}

#[test]
fn last_lines_of_those_who_close_at_once_are_carried_out() {
    let server = start("");
    let mut ana = Person::join(&server.address, "ana");
    let mut talkers = crowd(&server, 6, "t");
    let flood = format!("MSG {}\n", "x".repeat(3900)).repeat(16);
    let mut heard = 0;
    for round in 0..10 {
        let passing: Vec<_> =
            (0..20).map(|it| Person::join(&server.address, &format!("p{round}.{it}"))).collect();
        // More is said at once than the server hands on in one go. So it writes to those who pass
        // before it reads their last line; and Linux resets what is closed with something unread.
        at_once(&server, || {
            talkers.iter_mut().for_each(|talker| talker.say(&flood));
            passing.into_iter().for_each(|mut person| person.say("MSG last words"));
        });
        loop {
            let (count, lines) = ana.count();
            heard += lines.iter().filter(|line| line.ends_with(" last words")).count();
            if count == 1 + talkers.len() {
                break;
            }
        }
        talkers.iter_mut().for_each(|talker| drop(talker.fence()));
    }
    assert_eq!(heard, 200);
}

#[test]
fn without_descriptors_the_server_refuses_rests_and_recovers() {
    let mut server = start("");
    let mut ana = Person::join(&server.address, "ana");
    let bob = Person::join(&server.address, "bob");
    ana.fence();
    // The limit is on the numbers of descriptors, so the gaps are filled first.
    let open = server.descriptors();
    let limit = open.iter().max().expect("some") + 1;
    let _fillers = connect(&server.address, limit - open.len());
    let mut prlimit = Command::new("prlimit");
    prlimit.args(["--pid", &server.child.id().to_string(), &format!("--nofile={limit}:{limit}")]);
    assert!(prlimit.status().expect("prlimit").success());
    for _ in 0..50 {
        let mut extra = Person::connect(&server.address);
        assert!(extra.is_refused());
        assert!(extra.ends());
    }
    shown(&mut server, &["refused", "descriptors"]);
    let before = processor_time(server.child.id());
    idle(Duration::from_millis(500));
    let used = processor_time(server.child.id()) - before;
    assert!(used < Duration::from_millis(50), "{used:?} of 500 ms idle");
    bob.leave();
    ana.until("LEFT bob");
    // Bob's place is free as soon as his connection is closed on both sides.
    while Person::connect(&server.address).is_refused() {}
    ana.fence();
}

#[test]
fn so_few_descriptors_that_nobody_could_be_served_are_said_at_once() {
    let mut child = Command::new("sh")
        .args(["-c", "ulimit -n 8; exec \"$0\" 127.0.0.1:0", PROGRAM])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut first = String::new();
    BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut first).expect("reads");
    let _ = child.kill();
    let output = child.wait_with_output().expect("ended");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert_eq!((first.as_str(), output.status.code()), ("", Some(1)), "{complaint}");
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
    assert!(complaint.contains("ulimit -n"), "{complaint}");
}

#[test]
fn one_address_can_be_limited() {
    // This machine's own addresses count where the option is given; IPv6 is another address.
    let server = start_by("exec \"$0\" --max-per-ip 3 '[::]:0'");
    let at = |host| format!("{host}:{}", server.address.rsplit(':').next().expect("a port"));
    let _people = connect(&at("127.0.0.1"), 3);
    assert!(Person::connect(&at("127.0.0.1")).is_refused());
    assert!(!Person::connect(&at("[::1]")).is_refused());
}

#[test]
fn the_silent_cost_little_and_end() {
    let server = start("--name-timeout 3");
    let many = (descriptor_limit() / 3).min(5000);
    let before = server.memory();
    let mut silent = connect(&server.address, many);
    for (at, person) in silent.iter_mut().enumerate() {
        if at % 2 == 0 {
            person.socket().write_all(b"N").expect("takes a byte");
        }
    }
    let mut ana = Person::join(&server.address, "ana");
    ana.fence();
    let each = (server.memory() - before) / many;
    assert!(each < 2000, "{each} bytes for each");
    for mut person in silent {
        assert!(person.line().starts_with("ERR timeout"));
        assert!(person.ends());
    }
    ana.fence();
}

#[test]
fn resets_at_any_moment_are_only_that_connections() {
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
    while ana.count().0 != 1 || server.descriptors().len() >= 20 {}
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
fn a_paused_terminal_does_not_stop_the_chat() {
    // script(1) gives the server a terminal whose other end nobody reads once its pipe is full.
    let command = format!("echo $$; exec {PROGRAM} --verbose 127.0.0.1:0");
    let mut child = Command::new("script")
        .args(["--quiet", "--flush", "--command", &command, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut console = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let mut line = || console.next().expect("a line").expect("UTF-8");
    let process = line();
    let mut talker = Person::join(line().rsplit(' ').next().expect("an address"), "ana");
    talk(&mut talker, 2000, 777);
    talker.fence();
    // script(1) would leave the server behind, and cannot end while its own output is not read.
    signal(process.trim().parse().expect("a number"), "KILL").expect("sent");
    child.kill().expect("ends");
    child.wait().expect("ended");
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
fn a_signal_shows_the_state() {
    let mut server = start("");
    let mut ana = Person::join(&server.address, "ana");
    send(&server, "USR1");
    let words = ["open", "named", "closing", "soft limit", "waiting", "dropped", "since"];
    let line = shown(&mut server, &words);
    // One line for one signal; and the chat goes on.
    ana.fence();
    ana.leave();
    let next = server.next_line().expect("the console goes on").expect("a line");
    assert!(next.contains("ana left"), "{line}, then {next}");
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
    // The server finds all of this, and the request to stop behind it, when it goes on.
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
    assert!(more < 64, "{more} MiB to stop while {many} people are owed 180 KiB");
}

#[test]
fn a_second_signal_stops_at_once() {
    let mut server = start("");
    let mut lazy = Person::join(&server.address, "lazy");
    let mut ana = Person::join(&server.address, "ana");
    // Somebody is owed more than the kernel takes, so that the stop has to wait.
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
    // One is idle when the link goes, and to the other something is on its way.
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
fn what_the_shell_sees() {
    let run = |arguments: &[&str]| {
        let output = Command::new(PROGRAM).args(arguments).output().expect("runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (status, complaint) = run(&["--nonsense"]);
    assert_eq!((status, complaint.lines().count()), (Some(2), 1));
    let server = start("");
    let (status, complaint) = run(&[&server.address]);
    assert_eq!((status, complaint.lines().count()), (Some(1), 1));
    assert!(complaint.contains(&server.address), "{complaint}");
    assert!(complaint.contains("another server"), "{complaint}");
    // The soft limit on open files is raised to the hard one.
    let server = start_by("ulimit -S -n 64; exec \"$0\" \"$1\"");
    connect(&server.address, 100.min(descriptor_limit()));
}
