//! README.md against the programs: the sample conversation, the tables of options and of the
//! console's lines, and the exit statuses.
//!
//! The sample screen of linechat-client is played by `terminal-line-survives-what-arrives.txt`.

mod person;
#[path = "../suite/process.rs"]
mod process;

use person::Person;
use process::{signal, Server, STUCK};
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::thread;

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

fn start(options: &[&str]) -> Server {
    let options: Vec<_> = options.iter().map(|option| (*option).to_owned()).collect();
    Server::start(&options).expect("the server starts")
}

fn next_line(server: &mut Server) -> String {
    server.next_line().expect("the console can be read").expect("a line of the console")
}

/// Runs a program with this input. Returns its exit status and its standard output.
fn run(program: &str, arguments: &[&str], input: &str) -> (Option<i32>, String) {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.env("LC_ALL", "C.UTF-8").spawn().expect("the program can be started");
    // A program that refuses its arguments does not read its input.
    let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
    let output = child.wait_with_output().expect("the program ends");
    (output.status.code(), String::from_utf8(output.stdout).expect("UTF-8"))
}

/// The options that `--help` lists, apart from `--help` and `--version`, and their meanings.
fn options(program: &str) -> Vec<(String, String)> {
    let (status, help) = run(program, &["--help"], "");
    assert_eq!(status, Some(0));
    let mut options: Vec<(String, String)> = Vec::new();
    let lines = help.lines().skip_while(|line| *line != "Options:").skip(1);
    for line in lines.take_while(|line| !line.is_empty()).map(str::trim) {
        if !line.starts_with("--") {
            let (_, meaning) = options.last_mut().expect("an option before its second line");
            *meaning += &format!(" {line}");
            continue;
        }
        // An argument is in capitals, or a choice such as `en|pt`.
        let is_argument = |word: &&str| {
            !word.is_empty() && word.chars().all(|c| c.is_ascii_uppercase()) || word.contains('|')
        };
        let name = line.split(' ').next().unwrap_or_default();
        let argument = line.split(' ').nth(1).filter(is_argument);
        let option = argument.map_or(name.to_owned(), |argument| format!("{name} {argument}"));
        let meaning = line[option.len()..].trim().to_owned();
        options.push((format!("`{option}`"), meaning));
    }
    options.retain(|(option, _)| option != "`--help`" && option != "`--version`");
    options
}

#[test]
fn tables_of_options_are_those_of_help() {
    assert_eq!(table("## The client", "| option |"), options(CLIENT));
    assert_eq!(table("## The server", "| option |"), options(SERVER));
}

#[test]
fn sample_conversation_is_what_the_server_sends() {
    let server = start(&[]);
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
    assert!(ana.ends());
}

/// Returns true if the console's `line` has a form of README's table. ADDR, NAME and N in it stand
/// for one word, TEXT for the rest of the line.
fn has_form(line: &str, form: &str) -> bool {
    let mut words = line.split(' ');
    for expected in form.split(' ') {
        let Some(word) = words.next() else { return false };
        let is_alike = match expected {
            "ADDR" => word.parse::<SocketAddr>().is_ok(),
            "N" => word.parse::<u64>().is_ok(),
            "NAME" | "NAME," => word.ends_with(',') == expected.ends_with(','),
            "NAME:" => word.ends_with(':'),
            "TEXT" => return true,
            "\"TEXT\"" => return word.starts_with('"') && line.ends_with('"'),
            _ => word == expected,
        };
        if !is_alike {
            return false;
        }
    }
    words.next().is_none()
}

#[test]
fn table_of_the_console_has_what_the_console_shows() {
    let mut forms: Vec<(String, bool)> = Vec::new();
    for (first, meaning) in table("## The server", "| line of the console") {
        for form in quoted(&first) {
            match form.contains("REASON") {
                true => forms
                    .extend(quoted(&meaning).map(|reason| (form.replace("REASON", reason), false))),
                false => forms.push((form.to_owned(), false)),
            }
        }
    }
    let mut look_up = |line: &str| {
        let form = forms.iter_mut().find(|(form, _)| has_form(line, form));
        form.unwrap_or_else(|| panic!("not in README.md: {line}")).1 = true;
    };

    let mut server = start(&["--verbose", "--max-clients", "3", "--name-timeout", "1"]);
    look_up(&format!("listening on {}", server.address));
    let mut ana = Person::join(&server.address, "ana");
    let guest = Person::connect(&server.address);
    let other = Person::connect(&server.address);
    assert!(Person::connect(&server.address).is_refused());
    assert!(guest.ends() && other.ends());
    let mut browser = Person::connect(&server.address);
    browser.say("GET / HTTP/1.1");
    assert!(browser.ends());
    for mut visitor in [Person::connect(&server.address), Person::join(&server.address, "eve")] {
        visitor.say("QUIT");
        assert!(visitor.ends());
    }
    drop(Person::connect(&server.address));
    drop(Person::join(&server.address, "eve"));
    ana.until("LEFT eve 1 disconnected");
    ana.say("MSG hello");
    ana.fence();
    signal(server.child.id(), "TERM").expect("the signal is sent");
    while let Some(line) = server.next_line().expect("the console ends") {
        look_up(&line);
    }
    assert!(server.wait_within(STUCK).is_some_and(|status| status.success()));

    // Without --verbose: a flood of long lines would fill the console, which drops lines then.
    let mut server = start(&["--max-clients", "4000000000"]);
    let ana = Person::join(&server.address, "ana");
    let bob = Person::join(&server.address, "bob");
    // Bob reads no more. The thread ends when the server has ended.
    let mut voice = ana.voice();
    let flood = format!("MSG {}\n", "x".repeat(3900));
    let flood = thread::spawn(move || while voice.write_all(flood.as_bytes()).is_ok() {});
    loop {
        let line = next_line(&mut server);
        look_up(&line);
        if line.starts_with("the budget applies") {
            break;
        }
    }
    drop((server, bob));
    flood.join().expect("the flood ends");
    forms.retain(|(_, is_shown)| !is_shown);
    let never_shown: Vec<_> = forms.iter().map(|(form, _)| &**form).collect();
    // The server takes a minute to show the first of these; a unit test shows the second.
    let elsewhere =
        ["ADDR NAME left (slow), N online", "N lines dropped: the console was not read"];
    assert_eq!(never_shown, elsewhere);
}

#[test]
fn exit_statuses_are_those_of_the_programs() {
    let documented = |section: &str, status: i32, cause: &str| {
        let text = from(section).split_once("Exit status: ").expect("exit statuses").1;
        let text = text.split("\n\n").next().unwrap_or_default().replace('\n', " ");
        let mut parts = text.split("; ").filter(|part| part.starts_with(&status.to_string()));
        assert!(parts.any(|part| part.contains(cause)), "{status} {cause}: {text}");
    };
    let mut server = start(&[]);
    let closed = TcpListener::bind("127.0.0.1:0").expect("a port");
    let closed_address = closed.local_addr().expect("an address").to_string();
    drop(closed);

    let address = &*server.address.clone();
    for (status, cause, arguments, input) in [
        (0, "you left", [address, "bot"], "backup done\n"),
        (1, "a line was refused", [address, "bot"], "\u{1}\n"),
        (1, "not reached", [&closed_address, "bot"], ""),
        (2, "wrong usage", [address, ""], "no name\n"),
        (2, "wrong usage", [address, "--nonsense"], ""),
    ] {
        documented("## The client", status, cause);
        let arguments = arguments.map(str::to_owned);
        let arguments: Vec<_> =
            arguments.iter().map(|it| &**it).filter(|it| !it.is_empty()).collect();
        assert_eq!(run(CLIENT, &arguments, input), (Some(status), String::new()), "{cause}");
    }

    documented("## The server", 1, "failure");
    assert_eq!(run(SERVER, &[address], "").0, Some(1));
    documented("## The server", 2, "wrong usage");
    assert_eq!(run(SERVER, &["--nonsense"], "").0, Some(2));
    documented("## The server", 0, "stopped");
    let mut ana = Person::join(address, "ana");
    signal(server.child.id(), "HUP").expect("the signal is sent");
    ana.fence();
    signal(server.child.id(), "INT").expect("the signal is sent");
    ana.until("BYE ");
    assert!(ana.ends());
    assert_eq!(server.wait_within(STUCK).and_then(|status| status.code()), Some(0));
}
