//! Hostile, unlucky and slow peers against the real server: what takes more than a transcript can
//! say. Every test starts a server of its own on a free port. Where something must not happen, a
//! PING that is answered shows that it has not; no test has a limit of time.
//!
//!     cargo test --release --test stress
//!     cargo test --release --test stress -- --ignored    those that need root, or a minute

// It looks into /proc, and takes the network apart.
#![cfg(target_os = "linux")]

mod person;
#[path = "../suite/process.rs"]
mod process;

use person::Person;
use process::{descriptor_limit, processor_time, signal, Server, STUCK};
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

/// Where a server that listens on every address is reached on this one.
fn at(host: &str, server: &Server) -> String {
    format!("{host}:{}", server.address.rsplit(':').next().expect("a port"))
}

/// So many who join, all at once, and have these names with a number behind.
fn crowd(server: &Server, count: usize, name: &str) -> Vec<Person> {
    let mut crowd: Vec<_> = (0..count).map(|_| Person::connect(&server.address)).collect();
    for (number, person) in crowd.iter_mut().enumerate() {
        person.say(&format!("NAME {name}{number}"));
    }
    crowd.iter_mut().for_each(|person| drop(person.until("WELCOME ")));
    crowd
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
fn a_flood_reaches_a_slow_reader_whole_and_delays_nobody() {
    let server = start("");
    let mut slow = Person::join(&server.address, "slow");
    let mut ana = Person::join(&server.address, "ana");
    let mut bob = Person::join(&server.address, "bob");
    let mut flooder = Person::join(&server.address, "flooder");
    let messages = 6000;
    let text = "x".repeat(1000);
    let flooding = thread::spawn(move || {
        for number in 1..=messages {
            flooder.say(&format!("MSG {number} {text}"));
        }
        flooder.fence();
        flooder
    });
    // Reads about 2 MB a second: 20 kB each hundredth.
    let reading = thread::spawn(move || {
        let mut next = 1;
        while next <= messages {
            let line = slow.until("MSG flooder ");
            assert!(line.starts_with(&format!("MSG flooder {next} ")), "expected {next}: {line}");
            next += 1;
            if next % 20 == 0 {
                idle(Duration::from_millis(10));
            }
        }
        slow
    });
    // Meanwhile two others talk, and are answered within what few turns bring.
    let (mut number, mut seen) = (0, 0);
    while seen < messages {
        number += 1;
        ana.say(&format!("PRIV @bob {number}"));
        for person in [&mut ana, &mut bob] {
            loop {
                let line = person.line();
                assert!(!line.starts_with("LEFT"), "{line}");
                if line == format!("PRIV ana {number}") || line == format!("SENT bob {number}") {
                    break;
                }
                if line.starts_with("MSG flooder ") {
                    seen = line.split(' ').nth(2).and_then(|it| it.parse().ok()).unwrap_or(seen);
                }
            }
        }
        if flooding.is_finished() && number > 50 {
            break;
        }
    }
    assert!(number > 50, "only {number} private messages went through during the flood");
    let mut slow = reading.join().expect("everything arrived in order");
    let mut flooder = flooding.join().expect("the flooder stays");
    assert!(slow.fence().is_empty());
    assert!(flooder.fence().iter().all(|line| !line.starts_with("LEFT")));
    ana.say("LIST");
    assert_eq!(ana.until("USERS"), "USERS 4 slow ana bob flooder");
}

#[test]
fn everybody_gets_everything_however_little_their_sockets_take() {
    let server = start("");
    let (talkers, messages) = (4, 4000);
    // Reads in small bites, so that the server's writes are often taken in part.
    let read = |person: Person, own: usize| {
        thread::spawn(move || {
            let mut lines = BufReader::with_capacity(200, person.voice());
            let mut next = [1; 4];
            let mut line = String::new();
            while (0..talkers).any(|at| at != own && next[at] <= messages) {
                line.clear();
                assert!(lines.read_line(&mut line).expect("a line in time") > 0);
                let words: Vec<_> = line.split(' ').collect();
                if let ["MSG", from, number, ..] = words.as_slice() {
                    let at: usize = from[1..].parse().expect("a number");
                    assert_eq!(*number, next[at].to_string(), "of {from}");
                    next[at] += 1;
                }
            }
            person
        })
    };
    let (readers, speakers) = (crowd(&server, 10, "r"), crowd(&server, talkers, "t"));
    let mut handles: Vec<_> = readers.into_iter().map(|it| read(it, usize::MAX)).collect();
    let voices: Vec<_> = speakers
        .iter()
        .map(|it| it.voice())
        .map(|mut socket| {
            thread::spawn(move || {
                for number in 1..=messages {
                    let text = "x".repeat(100 + number % 1000);
                    writeln!(socket, "MSG {number} {text}").expect("takes a line");
                }
            })
        })
        .collect();
    handles.extend(speakers.into_iter().enumerate().map(|(own, it)| read(it, own)));
    voices.into_iter().for_each(|voice| voice.join().expect("all was said"));
    handles.into_iter().for_each(|handle| drop(handle.join().expect("all arrived")));
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
fn who_sends_without_pause_does_not_keep_others_waiting() {
    let server = start("");
    let flooders = crowd(&server, 8, "f");
    let mut ana = Person::join(&server.address, "ana");
    // Requests of which the others receive nothing.
    let handles: Vec<_> =
        flooders.into_iter().map(|it| it.flood("PRIV @nobody x\n".repeat(1000))).collect();
    for _ in 0..200 {
        ana.fence();
    }
    drop(server);
    handles.into_iter().for_each(|handle| handle.join().expect("a flooder ends"));
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
        signal(server.child.id(), "STOP").expect("sent");
        talkers.iter_mut().for_each(|talker| talker.say(&flood));
        passing.into_iter().for_each(|mut person| person.say("MSG last words"));
        signal(server.child.id(), "CONT").expect("sent");
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

/// Lets the server open no more descriptors than it has now. The limit is on their numbers, so the
/// gaps are filled first; returns who fills them.
fn exhaust_descriptors(server: &Server) -> Vec<Person> {
    let open = server.descriptors();
    let limit = open.iter().max().expect("some") + 1;
    let mut fillers: Vec<_> =
        (open.len()..limit).map(|_| Person::connect(&server.address)).collect();
    assert!(fillers.iter_mut().all(|person| !person.is_refused()));
    let id = server.child.id().to_string();
    let limited = Command::new("prlimit")
        .args(["--pid", &id, &format!("--nofile={limit}:{limit}")])
        .status()
        .expect("prlimit");
    assert!(limited.success());
    fillers
}

#[test]
fn without_descriptors_the_server_refuses_rests_and_recovers() {
    let mut server = start("");
    let mut ana = Person::join(&server.address, "ana");
    let bob = Person::join(&server.address, "bob");
    ana.fence();
    let _fillers = exhaust_descriptors(&server);
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
#[ignore = "needs strace"]
fn a_refusal_for_lack_of_descriptors_takes_few_system_calls() {
    let counts = scratch("strace");
    // With -D the server is this program's child, and strace(1) its grandchild.
    let mut traced = Command::new("strace");
    traced.args(["-D", "-f", "-c", "-o"]).arg(&counts).arg(PROGRAM);
    let mut server = Server::start_as(&mut traced).expect("the server starts");
    let mut ana = Person::join(&server.address, "ana");
    let fillers = exhaust_descriptors(&server);
    for _ in 0..20 {
        assert!(Person::connect(&server.address).is_refused());
        // Whatever else the server does for one refusal it has done before it answers.
        ana.fence();
    }
    signal(server.child.id(), "TERM").expect("sent");
    server.child.wait().expect("ended");
    // strace(1) ends after what it watches: "100.00    0.000000           0       123         4 total"
    let total = loop {
        let counts = fs::read_to_string(&counts).unwrap_or_default();
        if let Some(line) = counts.lines().find(|line| line.ends_with(" total")) {
            break line.split_whitespace().nth(3).and_then(|word| word.parse::<usize>().ok());
        }
    };
    let total = total.expect("the number of calls");
    fs::remove_file(&counts).expect("removes");
    // Starting and stopping take some, and every connection.
    let most = 1000 + 30 * fillers.len() + 20 * 50;
    assert!(total < most, "{total} system calls, {} connections and 20 refusals", fillers.len());
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
    let mut server = start_by("exec \"$0\" --max-per-ip 3 '[::]:0'");
    let (here, there) = (at("127.0.0.1", &server), at("[::1]", &server));
    let mut people: Vec<_> = (0..3).map(|_| Person::connect(&here)).collect();
    assert!(people.iter_mut().all(|person| !person.is_refused()));
    let mut extra = Person::connect(&here);
    assert!(extra.is_refused());
    assert!(extra.ends());
    shown(&mut server, &["refused", "from there"]);
    assert!(!Person::connect(&there).is_refused());
    people.pop().expect("three").leave();
    while Person::connect(&here).is_refused() {}
}

#[test]
fn without_the_option_this_machines_own_address_is_not_limited() {
    for options in ["", "--max-per-ip 0"] {
        let server = start(options);
        let mut people: Vec<_> = (0..201).map(|_| Person::connect(&server.address)).collect();
        assert!(people.iter_mut().all(|person| !person.is_refused()));
    }
}

/// Runs the test of this name once more in a network of its own, after these commands for ip(8).
/// Whether this already is that run.
fn is_in_own_network(test: &str, commands: &[&str]) -> bool {
    const INSIDE: &str = "LINECHAT_OWN_NETWORK";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let setup: String = commands.iter().map(|command| format!("ip {command} && ")).collect();
    let script = format!("ip link set lo up && {setup} exec \"$0\" --exact {test} --ignored");
    let output = Command::new("unshare")
        .args(["--map-root-user", "--net", "sh", "-c", &script])
        .arg(std::env::current_exe().expect("this program"))
        .env(INSIDE, "1")
        .output()
        .expect("unshare");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
    false
}

#[test]
#[ignore = "needs a network namespace: unshare and iproute2, and most often root"]
fn two_hundred_from_one_address_are_the_default() {
    // Who goes to 10.1.0.1 comes from 10.2.0.1, which to the server is another machine's.
    let network = ["addr add 10.2.0.1/32 dev lo", "route add local 10.1.0.1 dev lo src 10.2.0.1"];
    if !is_in_own_network("two_hundred_from_one_address_are_the_default", &network) {
        return;
    }
    let server = start_by("exec \"$0\" '0.0.0.0:0'");
    let address = at("10.1.0.1", &server);
    let mut people: Vec<_> = (0..200).map(|_| Person::connect(&address)).collect();
    assert!(people.iter_mut().all(|person| !person.is_refused()));
    assert!(Person::connect(&address).is_refused());
    let server = start_by("exec \"$0\" --max-per-ip 0 '0.0.0.0:0'");
    let mut people: Vec<_> = (0..201).map(|_| Person::connect(&at("10.1.0.1", &server))).collect();
    assert!(people.iter_mut().all(|person| !person.is_refused()));
}

#[test]
#[ignore = "needs a network namespace: unshare and iproute2, and most often root"]
fn an_ipv6_network_of_64_bits_is_one_address() {
    let network = ["fd00:0:0:1::1", "fd00:0:0:1:8000::2", "fd00:0:0:1::3", "fd00:0:0:2::1"]
        .map(|address| format!("-6 addr add {address}/128 dev lo nodad"));
    let network: Vec<_> = network.iter().map(String::as_str).collect();
    if !is_in_own_network("an_ipv6_network_of_64_bits_is_one_address", &network) {
        return;
    }
    let server = start_by("exec \"$0\" --max-per-ip 2 '[::]:0'");
    let connect = |address: &str| Person::connect(&at(&format!("[{address}]"), &server));
    let mut people = ["fd00:0:0:1::1", "fd00:0:0:1:8000::2"].map(connect);
    assert!(people.iter_mut().all(|person| !person.is_refused()));
    assert!(connect("fd00:0:0:1::3").is_refused());
    assert!(!connect("fd00:0:0:2::1").is_refused());
}

#[test]
fn a_closing_connection_has_its_place_until_it_is_over() {
    let server = start("--max-clients 20");
    let open = server.descriptors().len();
    // They have quit, and never end their side. The oldest of them makes room for the next.
    let mut closing = Vec::new();
    for number in 0..60 {
        let mut person = Person::join(&server.address, &format!("p{number}"));
        person.say("QUIT");
        person.until("BYE ");
        closing.push(person);
        let more = server.descriptors().len() - open;
        assert!(more <= 20, "{more} connections after {number} have quit");
    }
}

#[test]
#[ignore = "takes ten seconds"]
fn who_quits_and_does_not_read_costs_one_place_and_ten_seconds() {
    let server = start_by("exec \"$0\" --max-clients 20 --max-per-ip 10 '[::]:0'");
    let (here, there) = (at("127.0.0.1", &server), at("[::1]", &server));
    let mut ana = Person::join(&there, "ana");
    let mut lazy: Vec<_> = (0..10).map(|it| Person::join(&here, &format!("lazy{it}"))).collect();
    ana.fence();
    let (memory, open) = (server.memory(), server.descriptors().len());
    // More than the kernel takes for them; the server keeps the rest.
    let text = "x".repeat(3900);
    while server.memory() < memory + 1024 * 1024 {
        ana.say(&format!("MSG {text}"));
        ana.fence();
    }
    lazy.iter_mut().for_each(|person| person.say("QUIT"));
    (0..10).for_each(|_| assert!(ana.until("LEFT ").ends_with(" quit")));
    let begun = Instant::now();
    let mut refused = 0;
    while Person::connect(&here).is_refused() {
        refused += 1;
        assert!(begun.elapsed() < STUCK, "no place becomes free");
        // Eleven were open, of twenty.
        assert!(server.descriptors().len() <= open + 9);
        assert!(server.memory() < memory + 20 * 1024 * 1024);
        // Whoever comes from elsewhere is served meanwhile.
        Person::join(&there, "bob").leave();
        idle(Duration::from_millis(100));
    }
    assert!(refused > 0, "places are free while what is owed still waits");
}

#[test]
fn the_silent_cost_little_and_end() {
    let server = start("--name-timeout 3");
    let many = (descriptor_limit() / 3).min(5000);
    let before = server.memory();
    let mut silent: Vec<_> = (0..many).map(|_| Person::connect(&server.address)).collect();
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
        assert!(!person.is_refused());
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
    let text = "x".repeat(3000);
    (0..40).for_each(|number| talker.say(&format!("MSG {number} {text}")));
    talker.fence();
    (0..40).for_each(|number| drop(shown(&mut server, &[&format!("ana: {number} x")])));
    // Ten times what both hold together.
    (0..400).for_each(|number| talker.say(&format!("MSG {number} {text}")));
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
    for _ in 0..2000 {
        talker.say(&format!("MSG {}", "x".repeat(777)));
    }
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
    signal(server.child.id(), "STOP").expect("sent");
    drop(crowd);
    signal(server.child.id(), "CONT").expect("sent");
    while !ana.until("LEFT ").ends_with(" 1 disconnected") {}
    signal(server.child.id(), "TERM").expect("sent");
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
    signal(server.child.id(), "USR1").expect("sent");
    let words = ["open", "named", "closing", "soft limit", "waiting", "dropped", "since"];
    let line = shown(&mut server, &words);
    // One line for one signal; and the chat goes on.
    ana.fence();
    ana.leave();
    let next = server.next_line().expect("the console goes on").expect("a line");
    assert!(next.contains("ana left"), "{line}, then {next}");
}

#[test]
fn the_console_tells_when_flow_control_begins_and_ends() {
    let mut server = start("");
    let mut lazy = Person::join(&server.address, "lazy");
    let mut talker = Person::join(&server.address, "talker");
    // More than the kernel and the soft limit take, and less than the hard limit.
    let talking = thread::spawn(move || {
        let text = "x".repeat(3900);
        for number in 1..=1500 {
            talker.say(&format!("MSG {number} {text}"));
        }
        talker.fence();
    });
    shown(&mut server, &["flow control", "lazy"]);
    (1..=1500).for_each(|number| drop(lazy.until(&format!("MSG talker {number} x"))));
    shown(&mut server, &["flow control"]);
    talking.join().expect("all was said");
}

#[test]
fn a_stop_delivers_what_was_accepted() {
    let mut server = start("");
    let mut bob = Person::join(&server.address, "bob");
    let mut ana = Person::join(&server.address, "ana");
    bob.fence();
    let text = "x".repeat(1000);
    for number in 0..500 {
        ana.say(&format!("MSG {number} {text}"));
    }
    ana.fence();
    signal(server.child.id(), "HUP").expect("sent");
    signal(server.child.id(), "PIPE").expect("sent");
    ana.fence();
    signal(server.child.id(), "TERM").expect("sent");
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
fn a_stop_delivers_what_is_owed_to_those_who_go_on_sending() {
    let mut server = start("");
    let crowd = crowd(&server, 8, "p");
    let mut ana = Person::join(&server.address, "ana");
    let text = "x".repeat(3900);
    // As much as the kernel takes for each, so that all are done with at once.
    for number in 0..60 {
        ana.say(&format!("MSG {number} {text}"));
    }
    ana.fence();
    // Empty lines, which nobody answers. The server finds more of them than it reads in one turn,
    // and the request to stop.
    signal(server.child.id(), "STOP").expect("sent");
    let voices: Vec<_> = crowd.iter().map(|person| person.voice()).collect();
    let sending: Vec<_> = voices
        .into_iter()
        .map(|mut voice| thread::spawn(move || while voice.write_all(&[b'\n'; 65536]).is_ok() {}))
        .collect();
    signal(server.child.id(), "TERM").expect("sent");
    signal(server.child.id(), "CONT").expect("sent");
    for mut person in crowd {
        (0..60).for_each(|number| drop(person.until(&format!("MSG ana {number} x"))));
        person.until("BYE ");
        assert_eq!(person.next().expect("no reset"), None);
        let _ = person.socket().shutdown(Shutdown::Both);
    }
    assert_eq!(server.child.wait().expect("ended").code(), Some(0));
    sending.into_iter().for_each(|voice| voice.join().expect("a voice ends"));
}

#[test]
fn a_stop_in_the_middle_of_a_turn_takes_little_memory() {
    let server = start("");
    let many = (descriptor_limit() / 3).min(1500);
    let mut crowd = crowd(&server, many, "p");
    let before = server.peak_memory();
    // The server finds all of this, and the request to stop behind it, when it goes on.
    signal(server.child.id(), "STOP").expect("sent");
    let line = format!("MSG {}", "x".repeat(3900));
    for person in &mut crowd[..3] {
        (0..16).for_each(|_| person.say(&line));
    }
    signal(server.child.id(), "TERM").expect("sent");
    signal(server.child.id(), "CONT").expect("sent");
    // The kernel shows no memory of a process that has ended.
    let mut most = before;
    while let now @ 1.. = server.peak_memory() {
        most = most.max(now);
    }
    let more = (most - before) >> 20;
    let owed = (48 * line.len()) >> 10;
    assert!(more < 64, "{more} MiB to stop while {many} people are owed {owed} KiB");
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
    signal(server.child.id(), "TERM").expect("sent");
    assert!(ana.line().starts_with("BYE "));
    signal(server.child.id(), "TERM").expect("sent");
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
    // The soft limit on open files is raised to the hard one.
    let server = start_by("ulimit -S -n 64; exec \"$0\" \"$1\"");
    let mut crowd: Vec<_> =
        (0..100.min(descriptor_limit())).map(|_| Person::connect(&server.address)).collect();
    assert!(crowd.iter_mut().all(|person| !person.is_refused()));
}
