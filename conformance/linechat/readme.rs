//! README.md against the programs: the sample conversation, the tables of options and of the
//! console's lines, and the exit statuses.
//!
//! The sample screen of linechat-client is played by `terminal-line-survives-what-arrives.txt`.

mod person;
#[path = "../suite/process.rs"]
mod process;

use person::{start, Person};
use process::{signal, STUCK};
use std::collections::BTreeSet;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const README: &str = include_str!("../../README.md");
const SERVER: &str = env!("CARGO_BIN_EXE_linechat-server");
const CLIENT: &str = env!("CARGO_BIN_EXE_linechat-client");

/// README from the first place that holds `mark`.
fn from(mark: &str) -> &'static str {
    let start = README.find(mark).unwrap_or_else(|| panic!("README.md does not hold {mark:?}"));
    &README[start..]
}

/// The two cells of each row of the table with this heading, in this section.
fn table(section: &str, heading: &str) -> Vec<(String, String)> {
    let table = from(section).lines().skip_while(|line| !line.starts_with(heading));
    let rows = table.skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let row = row.replace("\\|", "\0");
        let cells: Vec<_> = row.split('|').map(|it| it.trim().replace('\0', "|")).collect();
        let [_, first, second, _] = &cells[..] else { panic!("not two cells: {row}") };
        (first.clone(), second.clone())
    })
    .collect()
}

/// The parts of `text` between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Runs a program with this input.
fn run(program: &str, arguments: &str, input: &str) -> Output {
    let mut command = Command::new(program);
    command.args(arguments.split(' ')).env("LC_ALL", "C.UTF-8");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program can be started");
    // A program that refuses its arguments does not read its input.
    let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
    child.wait_with_output().expect("the program ends")
}

#[test]
fn tables_of_options_are_those_of_help() {
    for (section, program) in [("## The client", CLIENT), ("## The server", SERVER)] {
        let output = run(program, "--help", "");
        assert!(output.status.success());
        let help = String::from_utf8(output.stdout).expect("UTF-8");
        let options = help.split("\n\n").find_map(|it| it.strip_prefix("Options:\n"));
        let options = options.expect("options").split_whitespace().collect::<Vec<_>>().join(" ");
        let rows = table(section, "| option |").into_iter();
        let rows = rows.map(|(option, meaning)| format!("{} {meaning} ", option.trim_matches('`')));
        let others = "--help show this --version show the version";
        assert_eq!(options, rows.collect::<String>() + others);
    }
}

#[test]
fn sample_conversation_is_what_the_server_sends() {
    let server = start("");
    let sample = from("    HELLO linechat/1").lines().take_while(|line| !line.is_empty());
    let mut ana = Person::connect(&server.address);
    let mut bob = Person::connect(&server.address);
    for line in sample.map(str::trim) {
        if let Some(request) = line.strip_suffix('←') {
            ana.say(request.trim());
            continue;
        }
        match line.split(' ').next() {
            Some("JOINED") => bob.say("NAME bob"),
            Some("MSG") => bob.say("MSG hello!"),
            Some("LEFT") => bob.say("QUIT"),
            _ => {}
        }
        assert_eq!(ana.line(), line);
    }
    ana.rest();
}

/// A line of the console as README's table writes it. The names in this test are ana and eve, and
/// the message is hello.
fn form(line: &str) -> String {
    let (line, quote) = line.split_once('"').map_or((line, ""), |(line, _)| (line, "\"TEXT\""));
    let words = line.split(' ').map(|word| match word {
        _ if word.parse::<SocketAddr>().is_ok() => "ADDR".to_owned(),
        _ if word.parse::<u64>().is_ok() => "N".to_owned(),
        _ => word.replace("ana", "NAME").replace("eve", "NAME").replace("hello", "TEXT"),
    });
    words.collect::<Vec<_>>().join(" ") + quote
}

#[test]
fn table_of_the_console_has_what_the_console_shows() {
    let mut forms = BTreeSet::new();
    for (lines, meaning) in table("## The server", "| line of the console") {
        for line in quoted(&lines) {
            match line.contains("REASON") {
                true => forms.extend(quoted(&meaning).map(|it| line.replace("REASON", it))),
                false => drop(forms.insert(line.to_owned())),
            }
        }
    }
    let mut shown = BTreeSet::new();
    let mut look_up = |line: &str| {
        assert!(forms.contains(&form(line)), "not in README.md: {line}");
        shown.insert(form(line));
    };

    let mut server = start("--verbose --max-clients 4000000000 --max-per-ip 3 --name-timeout 1");
    look_up(&format!("listening on {}", server.address));
    let mut ana = Person::join(&server.address, "ana");
    let guest = Person::connect(&server.address);
    let other = Person::connect(&server.address);
    assert!(Person::connect(&server.address).is_refused());
    guest.rest();
    other.rest();
    let mut browser = Person::connect(&server.address);
    browser.say("GET / HTTP/1.1");
    browser.rest();
    Person::connect(&server.address).leave();
    Person::join(&server.address, "eve").leave();
    drop(Person::connect(&server.address));
    drop(Person::join(&server.address, "eve"));
    ana.until("LEFT eve 1 disconnected");
    ana.say("MSG hello");
    // This eve reads nothing more.
    let eve = Person::join(&server.address, "eve");
    let text = "x".repeat(3900);
    let mut is_told = false;
    while !is_told {
        ana.say(&format!("PRIV @eve {text}"));
        ana.until("SENT ");
        if let Ok(Some(line)) = server.next_line_within(Duration::from_millis(1)) {
            look_up(&line);
            is_told = line.starts_with("the rate limit applies");
        }
    }
    drop(eve);
    signal(server.child.id(), "TERM").expect("the signal is sent");
    while let Some(line) = server.next_line_within(STUCK).expect("the console ends") {
        look_up(&line);
    }
    // The server takes a minute to show the first of these; a unit test shows the second.
    let elsewhere =
        ["ADDR NAME left (slow), N online", "N lines dropped: the console was not read"];
    assert!(forms.difference(&shown).eq(elsewhere), "{:?}", forms.difference(&shown));
}

#[test]
fn exit_statuses_are_those_of_the_programs() {
    let documented = |section: &str, status: i32, cause: &str| {
        let text = from(section).split_once("Exit status: ").expect("exit statuses").1;
        let text = text.split("\n\n").next().unwrap_or_default().replace('\n', " ");
        let mut parts = text.split("; ").filter(|part| part.starts_with(&status.to_string()));
        assert!(parts.any(|part| part.contains(cause)), "{status} {cause}: {text}");
    };
    let mut server = start("");
    let address = &*server.address.clone();
    // Nothing listens here any more.
    let closed = TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a port");
    let (there, nowhere) = (format!("{address} bot"), format!("{closed} bot"));
    for (section, program, status, cause, arguments, input, complaint) in [
        ("## The client", CLIENT, 0, "you left", &*there, "backup done\n", ""),
        ("## The client", CLIENT, 1, "a line was refused", &there, "\u{1}\n", "control"),
        ("## The client", CLIENT, 1, "connection failed", &nowhere, "", "cannot connect"),
        ("## The client", CLIENT, 2, "wrong usage", address, "no name\n", "--help"),
        ("## The client", CLIENT, 2, "wrong usage", "--nonsense", "", "--help"),
        ("## The server", SERVER, 1, "failure", address, "", "another server"),
        ("## The server", SERVER, 2, "wrong usage", "--nonsense", "", "--help"),
    ] {
        documented(section, status, cause);
        let output = run(program, arguments, input);
        let complaints = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout), (Some(status), vec![]), "{cause}");
        assert_eq!(complaints.is_empty(), status == 0, "{complaints}");
        assert!(complaints.contains(complaint), "{complaints}");
        assert!(section == "## The client" || complaints.lines().count() == 1, "{complaints}");
    }
    documented("## The server", 0, "stopped");
    signal(server.child.id(), "HUP").expect("the signal is sent");
    Person::join(address, "ana").fence();
    signal(server.child.id(), "INT").expect("the signal is sent");
    assert_eq!(server.wait_within(STUCK).and_then(|status| status.code()), Some(0));
}
