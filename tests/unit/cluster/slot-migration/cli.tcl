# redis-cli --cluster: slots move by slot migrations, are watched, listed and left alone.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

proc addr {n} {
    return 127.0.0.1:[node_port $n]
}

# Start redis-cli --cluster; it reads what is written to the handle, if not at once. With
# `terminal` as if its output were one.
proc start_cli {terminal args} {
    set env [list env -u NO_COLOR TERM=xterm-256color]
    if {$terminal} {lappend env FAKETTY=1}
    set fd [open |[list {*}$env src/redis-cli --cluster {*}$args 2>@1] r+]
    fconfigure $fd -blocking 0 -buffering none
    set ::cli_output($fd) ""
    lappend ::clis $fd
    return $fd
}

# Wait until it has printed this.
proc wait_cli_output {fd pattern} {
    wait_for_condition 1500 10 {[string match $pattern [append ::cli_output($fd) [read $fd]]]} else {
        fail "redis-cli printed: $::cli_output($fd), expected $pattern"
    }
}

# Wait until it has ended: its exit status. What it printed is in ::output.
proc wait_cli {fd} {
    wait_for_condition 3000 10 {[append ::cli_output($fd) [read $fd]] ne "" && [eof $fd]} else {
        fail "redis-cli does not end: $::cli_output($fd)"
    }
    set ::output $::cli_output($fd)
    set ::clis [lsearch -all -inline -not -exact $::clis $fd]
    fconfigure $fd -blocking 1
    if {![catch {close $fd} error options]} {return 0}
    lassign [dict get $options -errorcode] kind - status
    if {$kind ne "CHILDSTATUS"} {return $kind}
    return $status
}

proc interrupt_cli {fd} {
    exec kill -INT [lindex [pid $fd] 0]
}

proc cli {args} {
    wait_cli [start_cli 0 {*}$args]
}

proc cli_ok {args} {
    if {[cli {*}$args] != 0} {fail "redis-cli --cluster $args: $::output"}
    return $::output
}

# It ends with status 1 and says so.
proc cli_fails {pattern args} {
    assert_equal 1 [cli {*}$args] $::output
    assert_match $pattern $::output
}

# Those of a test that failed.
proc end_clis {} {
    foreach fd $::clis {
        catch {exec kill -9 [lindex [pid $fd] 0]}
        catch {close $fd}
    }
    set ::clis {}
}

set ::clis {}

proc file_text {file} {
    set f [open $file]
    set text [read $f]
    close $f
    return $text
}

proc job_ids {n} {
    lmap job [R $n cluster slot-migrations] {dict get $job id}
}

# Ids of jobs at node n that were not among `before`, oldest first.
proc new_jobs {n before} {
    lmap id [lreverse [job_ids $n]] {if {$id in $before} continue; set id}
}

# Wait until node n has `count` new jobs; their ids.
proc wait_new_jobs {n before {count 1}} {
    wait_for_condition 1500 10 {[llength [new_jobs $n $before]] == $count} else {
        fail "node $n has new jobs [new_jobs $n $before], expected $count"
    }
    new_jobs $n $before
}

proc slots_served {n} {
    set count 0
    foreach range [dict get [cluster_get_myself $n] slots] {
        lassign [split $range -] first last
        incr count [expr {$last eq "" ? 1 : $last-$first+1}]
    }
    return $count
}

# What each test begins with.
proc begin {} {
    end_clis
    fresh
    fill_strings 0 {5 6 7} 100
    set ::before0 [job_ids 0]
    set ::before1 [job_ids 1]
}

# Reshard is waiting for this job, which is ready but for the hand-off.
proc start_held_reshard {terminal} {
    failpoint 0 source_before_cut pause
    set fd [start_cli $terminal reshard [addr 1] --cluster-from [node_id 0] --cluster-to [node_id 2] --cluster-slots 10 --cluster-yes]
    set id [lindex [wait_new_jobs 0 $::before0] 0]
    wait_job_state 0 $id streaming
    wait_cli_output $fd "*[string range $id 0 7]*streaming*"
    return [list $fd $id]
}

# A node that gives its last slots away stays a master.
start_cluster 3 0 {tags {external:skip cluster tls:skip} overrides {cluster-allow-replica-migration no}} {
    for {set n 0} {$n < 3} {incr n} {set id$n [node_id $n]}

    test "reshard under load: one slot migration moves all slots, no ASK, nothing lost" {
        begin
        set dump [slots_dump 0 {5 6 7}]
        set writers [start_writers 2 {20 21}]
        wait_writers_go_on $writers
        cli_ok reshard [addr 1] --cluster-from $id0 --cluster-to $id2 --cluster-slots 100 --cluster-yes
        wait_writers_go_on $writers
        set seen [stop_writers $writers]
        assert_equal {0 0 {}} [list [dict get $seen ask] [dict get $seen tryagain] [dict get $seen errors]]
        set id [new_jobs 0 $::before0]
        assert_equal {1 0-99} [list [llength $id] [job_field 0 $id slots]]
        assert_match "*Slot migration $id: 0-99 (100 slots) from [addr 0] to [addr 2]*" $::output
        assert_match "*[string range $id 0 7]  100 slots  done  [job_field 0 $id keys-done] keys*write pause*" $::output
        assert_match "*\\\[OK\\] Moved 100 slots: [job_field 0 $id keys-done] keys, * in * longest write pause * ms.*" $::output
        wait_cluster_agrees
        assert_equal {2 2 0} [list [slot_owner 0 0] [slot_owner 0 99] [slot_owner 0 100]]
        assert_same_dump $dump [slots_dump 2 {5 6 7}]
    }

    test "Slots of two sources move at the same time" {
        begin
        failpoint 0 source_before_cut pause
        failpoint 1 source_before_cut pause
        set fd [start_cli 0 reshard [addr 0] --cluster-from $id0,$id1 --cluster-to $id2 --cluster-slots 20 --cluster-yes]
        set a [wait_new_jobs 0 $::before0]
        set b [wait_new_jobs 1 $::before1]
        wait_job_state 0 $a streaming
        wait_job_state 1 $b streaming
        failpoints_off 0
        failpoints_off 1
        assert_equal 0 [wait_cli $fd] $::output
        assert_match "*Moved 20 slots: *" $::output
    }

    test "On a terminal lines are drawn again, elsewhere there is no control character" {
        begin
        foreach terminal {0 1} {
            foreach {from to} [expr {$terminal ? {2 0} : {0 2}}] {}
            set fd [start_cli $terminal reshard [addr 0] --cluster-from [node_id $from] --cluster-to [node_id $to] --cluster-slots 10 --cluster-yes]
            assert_equal 0 [wait_cli $fd] $::output
            assert_equal $terminal [string match "*\033\\\[K*" $::output]
            assert_equal $terminal [string match "*\033\\\[*m*" $::output]
            wait_cluster_agrees
        }
        set fd [open |[list env NO_COLOR=1 TERM=xterm-256color FAKETTY=1 src/redis-cli --cluster check [addr 0] 2>@1]]
        assert_no_match "*\033*" [read $fd]
        close $fd
    }

    test "Why a job waits is said, and SIGINT without a terminal leaves it running" {
        begin
        lassign [start_held_reshard 0] fd id
        interrupt_cli $fd
        assert_equal 130 [wait_cli $fd]
        assert_match "*Left running: 1 slot migration*--cluster slot-migrations 127.0.0.1:*--cluster-watch*CLUSTER CANCEL-SLOT-MIGRATIONS ID $id*" $::output
        assert_equal streaming [job_field 0 $id state]
        failpoints_off 0
        wait_migrated 0 2 $id
    }

    test "SIGINT on a terminal asks: watching goes on, leaving is the default" {
        begin
        lassign [start_held_reshard 1] fd id
        interrupt_cli $fd
        wait_cli_output $fd "*\\\[l\\]eave running (default), \\\[c\\]ancel, go on \\\[w\\]atching?*"
        puts -nonewline $fd "w\n"
        wait_cli_output $fd "*atching? *[string range $id 0 7]*"
        interrupt_cli $fd
        wait_cli_output $fd "*atching?*atching?*"
        puts -nonewline $fd "\n"
        assert_equal 130 [wait_cli $fd]
        assert_match "*Left running: 1 slot migration*ID $id*" $::output
        assert_equal streaming [job_field 0 $id state]
        failpoints_off 0
        wait_migrated 0 2 $id
    }

    test "SIGINT on a terminal: another one, while it asks, leaves them running" {
        begin
        lassign [start_held_reshard 1] fd id
        interrupt_cli $fd
        wait_cli_output $fd "*atching? *"
        interrupt_cli $fd
        assert_equal 130 [wait_cli $fd]
        assert_match "*Left running: 1 slot migration*ID $id*" $::output
        assert_equal streaming [job_field 0 $id state]
        failpoints_off 0
        wait_migrated 0 2 $id
    }

    test "SIGINT on a terminal: cancelled jobs end it, with status 1" {
        begin
        lassign [start_held_reshard 1] fd id
        interrupt_cli $fd
        wait_cli_output $fd "*atching? *"
        puts -nonewline $fd "c\n"
        assert_equal 1 [wait_cli $fd] $::output
        assert_equal cancelled [job_field 0 $id state]
        assert_match "*Slot migration $id: cancelled  *" $::output
        failpoints_off 0
        assert_equal 0 [slot_owner 1 5]
    }

    test "A job that fails: status 1, its last error, what to do" {
        begin
        set dump [slots_dump 0 {5 6 7}]
        failpoint 0 source_before_cut pause
        set fd [start_cli 0 reshard [addr 1] --cluster-from $id0,$id1 --cluster-to $id2 --cluster-slots 20 --cluster-yes]
        set id [wait_new_jobs 0 $::before0]
        wait_job_state 0 $id streaming
        R 0 debug reload
        assert_equal 1 [wait_cli $fd] $::output
        assert_match "*Slot migration $id: failed  [job_field 0 $id last-error]*" $::output
        assert_match "*Moved 9 slots*1 slot migration did not succeed*then give the command again*" $::output
        failpoints_off 0
        assert_equal {0 2} [list [slot_owner 0 5] [slot_owner 0 5462]]
    }

    test "A refused move: status 1, the server's words" {
        begin
        with_config {2 {maxmemory 1000000}} {
            cli_fails "*refused: *$id2*" reshard [addr 1] --cluster-from $id0 --cluster-to $id2 --cluster-slots 10 --cluster-yes
        }
        assert_equal 0 [slot_owner 0 5]
    }

    test "--cluster-classic moves key by key" {
        begin
        set dump [slots_dump 0 {5 6 7}]
        cli_ok reshard [addr 1] --cluster-from $id0 --cluster-to $id2 --cluster-slots 10 --cluster-yes --cluster-classic
        assert_equal "" [new_jobs 0 $::before0]
        assert_match "*Moving slot 5 from*" $::output
        wait_cluster_agrees
        assert_same_dump $dump [slots_dump 2 {5 6 7}]
    }

    test "--cluster-dry-run shows the plan and moves nothing" {
        begin
        foreach args [list \
            [list reshard [addr 1] --cluster-from $id0 --cluster-to $id2 --cluster-slots 10] \
            [list migrate-slots [addr 1] --cluster-to $id2 --cluster-slots-ranges 0-9] \
            [list rebalance [addr 1] --cluster-weight $id0=0] \
        ] {
            set out [cli_ok {*}$args --cluster-dry-run]
            assert_match "*Nothing is moved*0-* slots) from [addr 0] to [addr 2]: * keys*" $out
        }
        assert_equal "" [new_jobs 0 $::before0]
        assert_equal {5462 5461 5461} [lsort -integer -decreasing [lmap n {0 1 2} {slots_served $n}]]
        cli_fails "*no master of the cluster has the id*" migrate-slots [addr 1] --cluster-to [string repeat 0 40] --cluster-slots-ranges 0-9 --cluster-dry-run
    }

    test "rebalance moves slots by weight, by slot migrations" {
        begin
        cli_ok rebalance [addr 0] --cluster-weight $id0=2 $id1=1 $id2=1
        wait_cluster_agrees
        assert_equal 8192 [slots_served 0]
        assert_equal 1 [llength [new_jobs 1 $::before1]]
        assert_match "*Moved * slots: *" $::output
        cli_ok rebalance [addr 0]
        wait_cluster_agrees
        assert_equal {5462 5461 5461} [lsort -integer -decreasing [lmap n {0 1 2} {slots_served $n}]]
    }

    test "rebalance --cluster-by keys evens out keys, not slots" {
        begin
        R 0 flushall
        fill_strings 0 {1 2 3 4 5 6 7 8 9} 90
        assert_equal 90 [R 0 dbsize]
        cli_ok rebalance [addr 0] --cluster-by keys --cluster-dry-run
        assert_equal "" [new_jobs 0 $::before0]
        cli_ok rebalance [addr 0] --cluster-by keys
        wait_cluster_agrees
        assert_equal {30 30 30} [lmap n {0 1 2} {R $n dbsize}]
        assert_match "*No rebalancing needed*" [cli_ok rebalance [addr 0] --cluster-by keys]
        cli_fails "*--cluster-by is slots, keys or bytes*" rebalance [addr 0] --cluster-by weight
    }

    test "rebalance --cluster-by bytes evens out what the keys take" {
        begin
        R 0 flushall
        # Few keys, and most of the bytes: where that slot is, nothing else may stay.
        foreach i {1 2} {R 0 set [key_in 1 big$i] [string repeat x 100000]}
        fill_strings 0 {2 3 4 5 6 7 8 9} 400 100
        cli_ok rebalance [addr 0] --cluster-by bytes
        wait_cluster_agrees
        assert_equal {2 200 200} [lmap n {0 1 2} {R $n dbsize}]
        assert_equal 0 [slot_owner 0 1]
        assert_match "*Nothing to move*" [cli_ok rebalance [addr 0] --cluster-by bytes]
    }

    test "slot-migrations --prometheus: each line is a sample, those that run one by one" {
        begin
        set id [lindex [R 0 cluster migrate-slots slotsrange 3 7 node $id2 hold] 0]
        wait_for_condition 1500 10 {[string match "ready and held*" [job_field 0 $id reason]]} else {fail [job 0 $id]}
        set out [cli_ok slot-migrations [addr 1] --prometheus]
        foreach line [split [string trim $out] "\n"] {
            assert {[regexp {^# (HELP|TYPE) redis_slot_migration\w+ } $line] ||
                    [regexp {^redis_slot_migration\w+\{(\w+="([^"\\]|\\.)*",?)+\} [0-9.e+-]+$} $line]}
        }
        foreach sample [list "info{id=\"$id\",slots=\"3-7\",source=\"[addr 0]\",target=\"[addr 2]\",state=\"streaming\",reason=\"ready and held*\"} 1" \
            "keys_done{id=\"$id\"} [job_field 0 $id keys-done]" "held{id=\"$id\"} 1" "bytes_done{id=\"$id\"} [job_field 0 $id bytes-done]"] {
            assert_match "*\nredis_slot_migration_$sample\n*" $out $sample
        }
        assert_match "*\nredis_slot_migrations_remembered{state=\"done\"} \[1-9\]*" $out
        R 0 cluster cancel-slot-migrations id $id
        wait_for_condition 500 10 {[jobs_running 2] == 0} else {fail "the target goes on"}
        assert_no_match "*$id*" [cli_ok slot-migrations [addr 1] --prometheus]
        cli_fails "*--prometheus is for slot-migrations*" check [addr 1] --prometheus
    }

    test "add-node and del-node --cluster-move-slots: a new master gets its share, one that goes gives its slots" {
        begin
        with_servers {new} {
            cli_ok add-node $new [addr 1] --cluster-move-slots
            assert_match "*New node added correctly*Moved 4096 slots*" $::output
            assert_equal 4096 [slots_of_master $new]
            foreach args {--cluster-hold --cluster-dry-run --cluster-no-wait --cluster-slave} {
                cli_fails "*ERR*" add-node $new [addr 1] --cluster-move-slots $args
            }
            cli_fails "*is not empty*" del-node [addr 1] [at $new cluster myid]
            cli_ok del-node [addr 1] [at $new cluster myid] --cluster-move-slots
            assert_match "*Moved 4096 slots*CLUSTER RESET SOFT*" $::output
            assert_equal 100 [expr {[R 0 dbsize]+[R 1 dbsize]+[R 2 dbsize]}]
        }
        wait_cluster_agrees
        assert_equal 16384 [expr {[slots_served 0]+[slots_served 1]+[slots_served 2]}]
        cli_fails "*is for add-node and del-node*" rebalance [addr 1] --cluster-move-slots
    }

    test "migrate-slots: ranges, HOLD, RATE, WAITREPLICAS, no wait; slot-migrations lists each job once" {
        begin
        cli_ok migrate-slots [addr 1] --cluster-from $id0 --cluster-to $id2 --cluster-slots-ranges 3-7,9 --cluster-hold \
            --cluster-rate 5000000 --cluster-wait-replicas 2 --cluster-no-wait
        set id [new_jobs 0 $::before0]
        assert_match "*$id*--cluster-watch*" $::output
        foreach {field value} {slots "3-7 9" held 1 rate-limit 5000000 wait-replicas 2} {
            assert_equal [string map {, " "} $value] [string map {, " "} [job_field 0 $id $field]] $field
        }
        wait_for_condition 1500 10 {[string match "ready and held*" [job_field 0 $id reason]]} else {fail [job 0 $id]}
        foreach n {0 1 2} {
            set out [cli_ok slot-migrations [addr $n]]
            assert_equal 1 [regexp -all "(?n)^$id  3-7,9 .6 slots. from [addr 0] to [addr 2]  .*RELEASE" $out] $out
            set json [cli_ok slot-migrations [addr $n] --json]
            assert_equal 1 [regexp -all "\"id\":\"$id\"" $json]
            assert_match "\\\[{*\"rate-limit\":5000000,*}\\]\n" $json
        }
        set fd [start_cli 0 slot-migrations [addr 1] --cluster-watch]
        wait_cli_output $fd "*Slot migration $id: 3-7,9*streaming*RELEASE*"
        R 0 cluster alter-slot-migration id $id release
        assert_equal 0 [wait_cli $fd] $::output
        assert_match "*  done  *" $::output
        wait_migrated 0 2 $id
        assert_equal {2 0 2} [list [slot_owner 1 7] [slot_owner 1 8] [slot_owner 1 9]]
    }

    test "--json: standard output has the jobs and nothing else" {
        begin
        set document [tmpfile cli.json]
        set node_timeout [lindex [R 0 config get cluster-node-timeout] 1]
        set line [list src/redis-cli --json --cluster]
        exec {*}$line migrate-slots [addr 1] --cluster-to $id2 --cluster-slots-ranges 3,9 --cluster-dry-run >$document 2>/dev/null
        assert_match "\\\[{*\"keys\":*}\\\]\n" [file_text $document]
        exec {*}$line migrate-slots [addr 1] --cluster-to $id2 --cluster-slots-ranges 3,9 >$document 2>/dev/null
        set id [new_jobs 0 $::before0]
        assert_match "\\\[{\"id\":\"$id\",\"slots\":\"3 9\",*\"state\":\"done\",*}\\\]\n" [file_text $document]
        exec {*}$line migrate-slots [addr 1] --cluster-to $id2 --cluster-slots-ranges 3,9 >$document 2>/dev/null
        assert_equal "\[\]\n" [file_text $document]
        catch {exec {*}$line migrate-slots [addr 1] --cluster-to $id2 --cluster-slots-ranges 9-3 >$document 2>/dev/null}
        assert_equal "" [file_text $document]
        cli_fails "*--cluster-no-wait has no --json*" migrate-slots [addr 1] --cluster-to $id0 --cluster-slots-ranges 3 --cluster-no-wait --json
        cli_fails "*--cluster-classic and --cluster-simulate have no --json*" reshard [addr 1] --cluster-classic --json
        cli_fails "*with --json nothing is asked*" reshard [addr 1] --cluster-from $id0 --json
        # A node that hangs is named, and not waited for.
        foreach n {0 1 2} {R $n config set cluster-node-timeout 60000}
        pause_process [srv -2 pid]
        assert_equal 1 [catch {exec {*}$line slot-migrations [addr 1] >$document 2>$document.warnings}]
        resume_process [srv -2 pid]
        foreach n {0 1 2} {R $n config set cluster-node-timeout $node_timeout}
        assert_match "\\\[{*\"id\":\"$id\"*}\\\]\n" [file_text $document]
        assert_match "*nodes that do not answer: 1*" [file_text $document.warnings]
    }

    test "Who may not watch is told so, and the jobs go on" {
        begin
        R 0 acl setuser blind on >secret ~* &* +@all -cluster|slot-migrations
        set auth {--user blind --pass secret --no-auth-warning}
        foreach n {1 2} {R $n acl setuser blind on >secret ~* &* +@all -cluster|slot-migrations}
        cli_fails "*refuses CLUSTER SLOT-MIGRATIONS: NOPERM*" slot-migrations [addr 1] {*}$auth
        cli_fails "*refuses CLUSTER SLOT-MIGRATIONS: NOPERM*go on*" migrate-slots [addr 1] --cluster-to $id2 --cluster-slots-ranges 3 {*}$auth
        set id [wait_new_jobs 0 $::before0]
        wait_migrated 0 2 $id
        foreach n {0 1 2} {R $n acl deluser blind}
    }

    test "migrate-slots refuses what it cannot do" {
        begin
        foreach {why args} {
            "*--cluster-slots-ranges: '3-x'*"   {--cluster-to $id2 --cluster-slots-ranges 3-x}
            "*'7-3'*"                           {--cluster-to $id2 --cluster-slots-ranges 7-3}
            "*'3,3'*"                           {--cluster-to $id2 --cluster-slots-ranges 3,3}
            "*'16384'*"                         {--cluster-to $id2 --cluster-slots-ranges 16384}
            "*Slot 5462 is not served by --cluster-from but by $id1*" {--cluster-from $id0 --cluster-to $id2 --cluster-slots-ranges 5461-5462}
            "*--cluster-to and a node's id must be given*"            {--cluster-slots-ranges 5}
            "*--cluster-to and a node's id must be given*"            {--cluster-to "" --cluster-from $id0}
            "*--cluster-from and a node's id must be given*"          {--cluster-to $id2}
            "*--cluster-classic is for*"                              {--cluster-to $id2 --cluster-slots-ranges 5 --cluster-classic}
        } {
            cli_fails [subst -nocommands $why] migrate-slots [addr 1] {*}[subst $args]
        }
        cli_fails "*--cluster-dry-run*are for migrate-slots, reshard and rebalance*" check [addr 1] --cluster-dry-run
        assert_equal "" [new_jobs 0 $::before0]
    }

    test "check tells of a running job, fix leaves its slots alone" {
        begin
        set id [lindex [R 0 cluster migrate-slots slotsrange 3 7 node $id2 hold] 0]
        assert_match "*Slot migrations that run: 1*$id*" [cli_ok check [addr 1]]
        # An open slot that is the job's, and one that is not.
        R 1 cluster setslot 5 importing $id0
        R 1 cluster setslot 9 importing $id0
        cli fix [addr 1]
        assert_match "*Slot 5 and all others of slot migration $id*are left alone*CANCEL-SLOT-MIGRATIONS ID $id*" $::output
        assert_no_match "*Fixing open slot 5*" $::output
        assert_match "*Fixing open slot 9*" $::output
        assert_match "*5-<-$id0*" [R 1 cluster nodes]
        assert_no_match "*9-<-*" [R 1 cluster nodes]
        assert_equal 0 [job_ended [job_field 0 $id state]]
        R 1 cluster setslot 5 stable
        R 0 cluster alter-slot-migration id $id release
        wait_migrated 0 2 $id
        assert_no_match "*Slot migrations that run*" [cli_ok check [addr 1]]
    }

    test "del-node refuses a node without slots that gets some" {
        begin
        move_slots 2 1 {*}[string map {- " "} [dict get [cluster_get_myself 2] slots]]
        set id [lindex [R 0 cluster migrate-slots slotsrange 3 7 node $id2 hold] 0]
        cli_fails "*is in slot migration $id*" del-node [addr 1] $id2
        assert_equal 0 [job_ended [job_field 0 $id state]]
        R 0 cluster alter-slot-migration id $id release
        wait_migrated 0 2 $id
    }

    test "A node that hangs while it is watched is named; the job is watched to its end" {
        begin
        lassign [start_held_reshard 0] fd id
        pause_process [node_pid 0]
        wait_cli_output $fd "*the source [addr 0] does not answer*"
        resume_process [node_pid 0]
        failpoints_off 0
        assert_equal 0 [wait_cli $fd] $::output
        assert_equal done [job_field 0 $id state]
    }

    test "An unpatched node gives and gets slots the classic way, and a line says why" {
        begin
        set dump [slots_dump 0 {5 6 7}]
        with_vanilla_node {
            $vanilla config set cluster-allow-replica-migration no
            set other [$vanilla cluster myid]
            cli_fails "*refused: *upgrade it*" migrate-slots [addr 1] --cluster-to $other --cluster-slots-ranges 0-9
            cli_fails "*refused: *without --cluster-hold*" reshard [addr 1] --cluster-from $id0 --cluster-to $other --cluster-slots 10 \
                --cluster-yes --cluster-hold
            assert_equal 0 [slot_owner 0 5]
            cli_ok reshard [addr 1] --cluster-from $id0 --cluster-to $other --cluster-slots 10 --cluster-yes
            assert_match "*0-9 (10 slots) from [addr 0] to 127.0.0.1:*: key by key, since *runs a server that cannot take slots*" $::output
            assert_equal $other [slot_owner 0 5]
            # To and from it at once: each pair as it can.
            cli_ok reshard [addr 1] --cluster-from $other,$id1 --cluster-to $id0 --cluster-slots 600 --cluster-yes
            assert_match "*key by key, since the source runs a server without slot migrations*" $::output
            assert_match "*Slot migration [new_jobs 1 $::before1]*Moved * slots*" $::output
            wait_slot_owner 0 5462 0
            cli_ok reshard [addr 1] --cluster-from $other --cluster-to $id0 --cluster-slots 9 --cluster-yes
            foreach slot {0 1 2 3 4 5 6 7 8 9} {wait_slot_owner 0 $slot 0}
        }
        assert_same_dump $dump [slots_dump 0 {5 6 7}]
    }

    test "An unpatched replica of the source: the classic way, and a line says why" {
        begin
        with_vanilla_node {
            $vanilla cluster replicate $id0
            wait_for_condition 1500 10 {[string match "*slave*$id0*" [$vanilla cluster nodes]] && [status [Rn 0] connected_slaves] == 1 &&
                [regexp "[$vanilla cluster myid]\[^\n]* slave $id0" [R 1 cluster nodes]] &&
                [string match "*master_link_status:up*" [$vanilla info replication]]} else {fail "no replica: [$vanilla info replication]"}
            cli_ok reshard [addr 1] --cluster-from $id0 --cluster-to $id2 --cluster-slots 10 --cluster-yes
            assert_match "*key by key, since *has a replica at *that runs a server which cannot*" $::output
        }
        wait_slot_owner 0 5 2
    }

    test "redis-cli knows the subcommands' arguments" {
        foreach {input hint} {
            "cluster migrate-slots " "SLOTSRANGE start-slot end-slot *HOLD*"
            "cluster slot-migrations " "*ID job-id*"
            "cluster alter-slot-migration " "ID job-id *RATE bytes-per-second*"
            "cluster cancel-slot-migrations " "ID job-id *ALL*"
        } {
            foreach server [list {} [list -p [node_port 0]]] {
                assert_match $hint [exec src/redis-cli {*}$server --test_hint $input]
            }
        }
    }

    end_clis
}

start_cluster 3 3 {tags {external:skip cluster tls:skip}} {
    test "With replicas: each job is listed once, and the replicas have the slots when reshard has ended" {
        wait_replicas_up
        fill_strings 0 {5 6 7} 100
        set before [job_ids 0]
        set dump [slots_dump 0 {5 6 7}]
        set writers [start_writers 2 {5 6}]
        cli_ok reshard [addr 1] --cluster-from [node_id 0] --cluster-to [node_id 2] --cluster-slots 10 --cluster-yes --cluster-wait-replicas 1
        set id [new_jobs 0 $before]
        assert_equal 1 [job_field 0 $id wait-replicas]
        stop_writers $writers
        wait_shard_in_step 2
        assert_equal 1 [regexp -all "(?n)^$id " [cli_ok slot-migrations [addr 4]]]
        cli_ok rebalance [addr 4]
        wait_shard_in_step 0
    }

    test "What a source says that its replica has replaced is not the migration's end" {
        set ::before0 [job_ids 0]
        lassign [start_held_reshard 0] fd id
        R 3 cluster failover
        wait_job_state 0 $id failed
        wait_job_state 3 $id done
        assert_equal 0 [wait_cli $fd] $::output
        assert_match "*\\\[OK\\\] Moved 10 slots: *" $::output
        assert_match "* done *" [cli_ok slot-migrations [addr 4]]
        assert_no_match "* failed *" $::output
    }
    end_clis
}
