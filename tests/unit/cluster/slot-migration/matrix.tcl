# Each of the four nodes that take part in a hand-off (the source S, its replica S', the
# target T, its replica T') dies, hangs, or loses a link at each step of it, under writes.
# Whatever happens, the job goes on: the target's shard has the slots as all see it and
# as they are served, with every acknowledged write, its replica has the same, nobody
# else has a key of them, the job is done at both ends, no record is left. The few that
# cannot go on say truly why, and the source's shard has the slots.
#
# Masters are nodes 0 to 2, the replica of node n is node n+3. The slots go to and fro
# between the shards of nodes 0 and 2; each row begins with the masters that the one
# before it left. After a row that failed a new cluster is made. SLOTMIG_MATRIX=all runs
# all rows (7 minutes); else each action, role and step has a turn.

source tests/support/slot_migration.tcl

set ::ranges {3 10}
set ::still {3 4 5 6 7}     ;# slots with a value of each kind
set ::busy {8 9 10}         ;# slots that are written to
set ::names {S "the source" S' "the source's replica" T "the target" T' "the target's replica"}

# A step, the states of S, T and T' in it (-: none, or not looked at), and what holds it.
set ::steps {
    connecting waiting   connecting -         {S source_before_fork pause}
    loading    snapshot  loading    loading   {T target_before_section pause T' target_before_section pause}
    copying    streaming following  loading   {S source_before_cut pause T' target_before_section pause}
    following  streaming following  following {S source_before_cut pause}
    telling    streaming following  following {S' source_replica_told fail}
    preparing  fenced    preparing  following {T target_before_prepared pause}
    readying   fenced    preparing  preparing {T' target_replica_prepared pause}
    prepared   fenced    prepared   prepared  {S source_before_commit pause}
    committed  committed prepared   prepared  {T target_before_takeover pause}
    taken      committed taken      done      {T target_after_takeover pause}
    trimming   trimming  done       done      {S source_before_trim pause}
}

# ---- who is who ----

proc other_of_shard {n} {
    expr {($n+3) % 6}
}

proc living {} {
    set nodes {}
    for {set n 0} {$n < 6} {incr n} {if {$n ne $::away} {lappend nodes $n}}
    return $nodes
}

# The masters of the shards as they are, "" for one whose master is away.
proc master_of_shard {n} {
    foreach m [list $n [other_of_shard $n]] {
        if {$m ne $::away && [status [Rn $m] role] eq "master"} {return $m}
    }
}

# Those that do not copy the owner of the slots.
proc strangers {owner} {
    lsearch -all -inline -not -regexp [living] "^($owner|[other_of_shard $owner])\$"
}

# Node numbers of the owners of the moving slots, as node n sees them.
proc owners_seen_by {n} {
    set owners {}
    lassign $::ranges first last
    foreach range [R $n cluster slots] {
        if {[lindex $range 1] < $first || [lindex $range 0] > $last} continue
        lappend owners [lsearch -exact $::ids [lindex $range 2 2]]
    }
    lsort -unique $owners
}

proc set_roles {} {
    set S [owners_seen_by 1]
    set T [master_of_shard [expr {$S % 3 == 0 ? 2 : 0}]]
    array set ::node [list S $S S' [other_of_shard $S] T $T T' [other_of_shard $T]]
}

# What node n tells of a job, "" if it does not know it.
proc job_if_known {n id} {
    if {$n eq "" || [catch {job $n $id} job]} {return ""}
    return $job
}

proc reason {role id} {
    set job [job_if_known [master_of_shard $::node($role)] $id]
    expr {$job eq "" ? "" : [dict get $job reason]}
}

# ---- what must hold ----

proc wait_replica_same {n replica} {
    wait_for_condition 1000 10 {
        [status [Rn $replica] master_link_status] eq "up" && [R $n debug digest] eq [R $replica debug digest] &&
        [R $n dbsize] == [R $replica dbsize]
    } else {
        fail "node $n has [R $n dbsize] keys, its replica [R $replica dbsize]: [R $n debug digest] [R $replica debug digest]"
    }
}

proc records {n} {
    exec sh -c "cat [lindex [R $n config get dir] 1]/nodes*.conf | grep -c slotmig-handoff || true"
}

proc wait_jobs_ended {} {
    foreach n [living] {
        wait_for_condition 3000 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}
        wait_for_condition 1000 10 {[records $n] == 0} else {fail "node $n has a record: [R $n cluster slot-migrations]"}
    }
}

# As all nodes that live see it, and as they serve it.
proc wait_one_owner {owner} {
    foreach n [living] {
        wait_for_condition 3000 10 {[owners_seen_by $n] eq $owner} else {
            fail "node $n sees the slots at [owners_seen_by $n], expected $owner: [R $n cluster nodes]"
        }
    }
    foreach slot [slots_of $::ranges] {
        set key [key_in $slot probe]
        wait_for_condition 1000 10 {![catch {R $owner append $key x} error]} else {fail "slot $slot at node $owner: $error"}
        R $owner del $key
        foreach n [strangers $owner] {
            assert_error "MOVED $slot *:[node_port $owner]" {R $n append $key x}
            wait_for_condition 1000 10 {[R $n cluster countkeysinslot $slot] == 0} else {fail "slot $slot has keys at node $n, too"}
        }
    }
}

# The job as its two masters tell of it. `end`: done, - (it is not known there: by who took
# its master's place when all was over), or why it failed (a regexp).
proc assert_job_ended {id at_source at_target} {
    foreach role {S T} end [list $at_source $at_target] {
        set job [job_if_known [master_of_shard $::node($role)] $id]
        set is -
        if {$job ne ""} {
            assert {[job_ended [dict get $job state]]}
            set is [expr {[dict get $job state] eq "done" ? "done[dict get $job last-error]" : [dict get $job last-error]}]
        }
        if {![regexp "^($end)\$" $is]} {fail "the job at [dict get $::names $role]'s shard is '$is', expected '$end'"}
    }
}

# It was not done before the two lost each other, but went on.
proc assert_went_on {id} {
    set times 0
    foreach role {S T} {
        set job [job_if_known [master_of_shard $::node($role)] $id]
        if {$job ne ""} {incr times [dict get $job interruptions]}
    }
    assert_morethan_equal $times 1
}

# ---- a row ----

proc begin_row {} {
    set ::away ""
    for {set n 0} {$n < 6} {incr n} {
        foreach {name value} {
            cluster-node-timeout 5000 cluster-replica-validity-factor 0 cluster-allow-replica-migration no
            cluster-slot-migration-wait-replicas 1 cluster-slot-migration-write-pause-timeout 5000
        } {R $n config set $name $value}
    }
    for {set n 0} {$n < 6} {incr n} {failpoints_off $n}
    wait_cluster_agrees
    set_roles
    foreach n {0 1 2 3 4 5} {
        if {[status [Rn $n] role] eq "slave"} {wait_replica_same [other_of_shard $n] $n}
    }
    set ::died ""
    set ::pids [node_pids]
    foreach slot $::busy {
        foreach key [R $::node(S) cluster getkeysinslot $slot 1000] {R $::node(S) del $key}
    }
}

# The steps' fail points, but at a node that is away.
proc release {points} {
    foreach {role point action} $points {
        if {$::node($role) ne $::away} {failpoint $::node($role) $point off}
    }
}

proc wait_step {id states} {
    foreach role {S T T'} state $states {
        if {$state ne "-"} {wait_job_state $::node($role) $id $state}
    }
}

proc seen_as_failing {n} {
    regexp "[lindex $::ids $n]\[^\n\]*\[ ,\](master|slave),fail\[ ,\]" [R 1 cluster nodes]
}

# A master is replaced, a replica is marked.
proc wait_missed {who} {
    if {$who in {S T}} {
        set mate [other_of_shard $::node($who)]
        wait_for_condition 3000 10 {[status [Rn $mate] role] eq "master"} else {fail "node $mate is not promoted"}
    } else {
        wait_for_condition 3000 10 {[seen_as_failing $::node($who)]} else {fail "nobody misses node $::node($who): [R 1 cluster nodes]"}
    }
}

# While it is away one of the masters says what it waits for.
proc wait_reason {id pattern} {
    if {$pattern eq ""} return
    wait_for_condition 1500 10 {[string match $pattern [reason S $id]] || [string match $pattern [reason T $id]]} else {
        fail "the reasons are '[reason S $id]' and '[reason T $id]', expected '$pattern'"
    }
}

proc do_action {who action id points meanwhile} {
    set n $::node($who)
    switch $action {
        dies {
            set ::away $n
            kill_node $n
            release $points
            wait_missed $who
            wait_reason $id $meanwhile
        }
        "dies, and is not waited for" {
            set ::away $n
            kill_node $n
            release $points
            wait_reason $id $meanwhile
            if {[job_field $::node(T) $id state] eq "taken"} {
                R $::node(T) config set cluster-slot-migration-wait-replicas 0
            } else {
                R $::node(T) cluster alter-slot-migration id $id waitreplicas 0
            }
        }
        hangs {
            set ::away $n
            pause_process [node_pid $n]
            wait_missed $who
            release $points
            wait_reason $id $meanwhile
            resume_process [node_pid $n]
            set ::away ""
            release $points
        }
        "stands still" {
            # Not for so long that anybody would miss it.
            set ::away $n
            pause_process [node_pid $n]
            release $points
            wait_reason $id $meanwhile
            resume_process [node_pid $n]
            set ::away ""
            release $points
        }
        "loses its link" {
            failpoint $n link_is_lost fail
            set lost "Slot migration [string range $id 0 7].*link to the .* is lost"
            wait_for_condition 1000 10 {[exec sh -c "grep -c '$lost' [srv -$n stdout] || true"] > 0} else {fail "node $n keeps the link: [job $n $id]"}
            failpoint $n link_is_lost off
            release $points
        }
        "is cut off from its master" {
            set master [other_of_shard $n]
            R $n config set masterauth wrong
            R $master client kill type replica
            wait_for_condition 1000 10 {[status [Rn $n] master_link_status] eq "down" && [status [Rn $master] connected_slaves] == 0} else {
                fail "node $n keeps its link"
            }
            release $points
            wait_reason $id $meanwhile
            R $n config set masterauth ""
        }
        "is not heard" {
            # What it does is done, and its answer is lost with the link.
            set ::away $n
            pause_process [node_pid $n]
            release $points
            wait_reason $id $meanwhile
            R [other_of_shard $n] client kill type replica
            resume_process [node_pid $n]
            set ::away ""
            release $points
        }
    }
}

# A row whose action is "crashes", "fails" or "is late" has a fail point in the place of a step.
proc run_row {who action step meanwhile at_source at_target} {
    begin_row
    set before [slots_dump $::node(S) $::still]
    if {$action in {dies hangs crashes}} {set_node_timeouts 1000}
    set ::writers [start_writers 1 $::busy [expr {$who in {S T} ? $::node($who) : -1}]]
    wait_writers_go_on $::writers 10
    set n $::node($who)
    if {$action in $::at_failpoint} {
        failpoint $n $step [string map {crashes crash fails fail "is late" delay} $action] [expr {$action eq "is late" ? 300 : 0}]
        if {$action eq "crashes"} {set ::away $n}
        if {[catch {migrate $::node(S) $::node(T) {*}$::ranges} id]} {set id [dict get [lindex [R $::node(S) cluster slot-migrations] 0] id]}
        if {$action eq "crashes"} {
            wait_node_dead $n
            wait_missed $who
        }
        wait_reason $id $meanwhile
        if {$action eq "fails"} {
            # Until the replica has lost the job.
            wait_for_condition 1000 10 {[job_if_known $n $id] ne "" && [job_ended [job_field $n $id state]]} else {fail "[job_if_known $n $id]"}
            failpoint $n $step off
        }
    } else {
        foreach {name s t t' points} $::steps {if {$name eq $step} break}
        foreach {role point how} $points {failpoint $::node($role) $point $how}
        set id [migrate $::node(S) $::node(T) {*}$::ranges]
        wait_step $id [list $s $t ${t'}]
        if {$step eq "telling"} {
            wait_for_condition 1000 10 {[string match "*has not confirmed that a hand-off is near*" [reason S $id]]} else {fail "[job $::node(S) $id]"}
        }
        do_action $who $action $id $points $meanwhile
    }
    # Who has died and is waited for comes back.
    if {$::away ne "" && $meanwhile ne "" && $action ne "dies, and is not waited for"} bring_back
    wait_jobs_ended
    set owner [master_of_shard $::node([expr {"done" in "$at_source $at_target" ? "T" : "S"}])]
    wait_one_owner $owner
    assert_job_ended $id $at_source $at_target
    if {$who in {S T} && $action in {dies hangs "loses its link"} && $s ni {committed trimming}} {assert_went_on $id}
    wait_writers_go_on $::writers 10
    assert_equal {} [lsearch -all -inline -not -regexp [dict get [stop_writers $::writers $owner] errors] {I/O error|refused|CLUSTERDOWN|reset by peer|READONLY|redirected 50 times|broken pipe}]
    set ::writers {}
    assert_same_dump $before [slots_dump $owner $::still]
    if {$::away ne ""} bring_back
    wait_jobs_ended
    wait_one_owner [master_of_shard $owner]
    foreach m [living] {
        if {[status [Rn $m] role] eq "slave"} {wait_replica_same [other_of_shard $m] $m}
        if {$m != $::died} {assert_equal [lindex $::pids $m] [node_pid $m] "node $m died"}
    }
    assert_same_dump $before [slots_dump $owner $::still]
}

proc bring_back {} {
    set n $::away
    set ::died $n
    # A replica copies everything anew, instead of going on from an old file by the backlog.
    file delete [file join [dict get [srv -$n config] dir] dump.rdb]
    start_node_again $n
    set ::away ""
    R $n config set cluster-replica-validity-factor 0 cluster-allow-replica-migration no
    wait_for_condition 3000 10 {[status [Rn $n] role] eq "slave" && [status [Rn $n] master_link_status] eq "up"} else {
        fail "node $n does not come back as a replica"
    }
}

# In a test: the writers end with it, and an error is one of this test only.
proc alone {body} {
    set ::writers {}
    if {![catch {uplevel 1 $body} error options]} return
    foreach writer $::writers {close [open [lindex $writer 1].stop w]}
    regsub "^assertion:" $error "" error
    foreach n [living] {catch {append error "\nnode $n: [status [Rn $n] role] [lindex [R $n cluster slot-migrations] 0]"}}
    fail "$error\n[dict get $options -errorinfo]"
}

# who; what it does; at which step (or fail point); what a master says meanwhile that it
# waits for; how the job ends at the source's master and at the target's (done, - or why it
# failed, see assert_job_ended): done at either, the target's shard has the slots, else the
# source's; run it always?
set ::rows {
    S  dies       connecting {} done done 1
    S  dies       loading    {} done done 0
    S  dies       copying    {} done done 0
    S  dies       following  {} done done 0
    S  dies       telling    {} done done 0
    S  dies       preparing  {} done done 0
    S  dies       readying   {} done done 0
    S  dies       prepared   {} done done 1
    S  dies       committed  {} done done 1
    S  dies       taken      {} done done 0
    S  dies       trimming   {} -    done 1
    S  hangs      connecting {} done done 0
    S  hangs      loading    {} done done 0
    S  hangs      copying    {} done done 0
    S  hangs      following  {} done done 0
    S  hangs      telling    {} done done 0
    S  hangs      preparing  {} done done 1
    S  hangs      readying   {} done done 0
    S  hangs      prepared   {} done done 0
    S  hangs      committed  {} done done 1
    S  hangs      taken      {} done done 0
    S  hangs      trimming   {} -    done 0
    S' dies       connecting {} done done 0
    S' dies       loading    {} done done 0
    S' dies       following  {} done done 1
    S' dies       telling    {} done done 0
    S' dies       preparing  {} done done 0
    S' dies       readying   {} done done 0
    S' dies       prepared   {} done done 0
    S' dies       committed  {} done done 0
    S' dies       taken      {} done done 0
    S' dies       trimming   {} done done 0
    S' hangs      connecting {} done done 0
    S' hangs      loading    {} done done 0
    S' hangs      following  {} done done 0
    S' hangs      telling    {} done done 1
    S' hangs      preparing  {} done done 0
    S' hangs      readying   {} done done 0
    S' hangs      prepared   {} done done 0
    S' hangs      committed  {} done done 0
    S' hangs      taken      {} done done 0
    S' hangs      trimming   {} done done 0
    S' "stands still" following  "*has not confirmed that a hand-off is near*" done done 1
    S' "is not heard" following  "*has not confirmed that a hand-off is near*" done done 0
    S' "is cut off from its master" following  {} done done 0
    S' "is cut off from its master" telling    {} done done 0
    S' "is cut off from its master" prepared   {} done done 1
    S' "is cut off from its master" committed  {} done done 0
    S' "is cut off from its master" trimming   {} done done 0
    T  dies       connecting {} done done 0
    T  dies       loading    {} done done 0
    T  dies       copying    {} done done 1
    T  dies       following  {} done done 0
    T  dies       telling    {} done done 0
    T  dies       preparing  {} done done 0
    T  dies       readying   {} done done 1
    T  dies       prepared   {} done done 0
    T  dies       committed  {} done done 0
    T  dies       taken      {} done done 1
    T  dies       trimming   {} done done 0
    T' dies       connecting "*of 1 replicas have the snapshot*" done done 0
    T' dies       loading    "*of 1 replicas have the snapshot*" done done 1
    T' dies       copying    "*of 1 replicas have the snapshot*" done done 0
    T' dies       following  "*of 1 replicas have the snapshot*" done done 0
    T' dies       telling    "*of 1 replicas have the snapshot*" done done 0
    T' dies       preparing  "*0 of 1 replicas have the slots*" done done 0
    T' dies       readying   "*0 of 1 replicas have the slots*" done done 0
    T' dies       prepared   "*0 of 1 replicas have taken*" done done 0
    T' dies       committed  "*0 of 1 replicas have taken*" done done 0
    T' dies       taken      "*0 of 1 replicas have taken*" done done 0
    T' dies       trimming   {} done done 0
    T' "dies, and is not waited for" loading    "*of 1 replicas have*" done done 0
    T' "dies, and is not waited for" following  "*of 1 replicas have*" done done 0
    T' "dies, and is not waited for" readying   "*of 1 replicas have*" done done 1
    T' "dies, and is not waited for" prepared   "*0 of 1 replicas have taken*" done done 0
    T' hangs      connecting "*of 1 replicas have*" done done 0
    T' hangs      loading    "*of 1 replicas have*" done done 0
    T' hangs      copying    "*of 1 replicas have*" done done 0
    T' hangs      following  "*of 1 replicas have*" done done 0
    T' hangs      telling    "*of 1 replicas have*" done done 0
    T' hangs      preparing  "*0 of 1 replicas have the slots*" done done 0
    T' hangs      readying   "*0 of 1 replicas have the slots*" done done 0
    T' hangs      prepared   "*0 of 1 replicas have taken*" done done 0
    T' hangs      committed  "*0 of 1 replicas have taken*" done done 0
    T' hangs      taken      {} done done 1
    T' hangs      trimming   {} done done 0
    T' "is cut off from its master" loading    "*of 1 replicas have the snapshot*" done done 0
    T' "is cut off from its master" copying    "*of 1 replicas have*" done done 0
    T' "is cut off from its master" following  "*of 1 replicas have*" done done 0
    T' "is cut off from its master" preparing  "*0 of 1 replicas have the slots*" done done 0
    T' "is cut off from its master" readying   "*0 of 1 replicas have the slots*" done done 0
    T' "is cut off from its master" prepared   "*0 of 1 replicas have taken*" done done 0
    T' "is cut off from its master" committed  "*0 of 1 replicas have taken*" done done 1
    T' "is cut off from its master" taken      "*0 of 1 replicas have taken*" done done 0
    T' "is cut off from its master" trimming   {} done done 0
    T' "is not heard" loading    "*of 1 replicas have*" done done 0
    T' "is not heard" preparing  "*0 of 1 replicas have the slots*" done done 0
    T' "is not heard" prepared   "*0 of 1 replicas have taken*" done done 1
    S  "loses its link" loading    {} done done 0
    S  "loses its link" copying    {} done done 0
    S  "loses its link" following  {} done done 0
    S  "loses its link" telling    {} done done 0
    S  "loses its link" preparing  {} done done 0
    S  "loses its link" readying   {} done done 1
    S  "loses its link" prepared   {} done done 0
    S  "loses its link" committed  {} done done 1
    S  "loses its link" taken      {} done done 0
    T  "loses its link" loading    {} done done 1
    T  "loses its link" copying    {} done done 0
    T  "loses its link" following  {} done done 0
    T  "loses its link" telling    {} done done 0
    T  "loses its link" preparing  {} done done 0
    T  "loses its link" readying   {} done done 0
    T  "loses its link" prepared   {} done done 1
    T  "loses its link" committed  {} done done 0
    T  "loses its link" taken      {} done done 0
    T  hangs      connecting {} done done 0
    T  hangs      loading    {} done done 0
    T  hangs      copying    {} done done 0
    T  hangs      following  {} done done 1
    T  hangs      telling    {} done done 0
    T  hangs      preparing  {} done done 0
    T  hangs      readying   {} done done 0
    T  hangs      prepared   {} done done 0
    T  hangs      committed  {} done done 1
    T  hangs      taken      {} done done 0
    T  hangs      trimming   {} done done 0
    S' crashes    source_replica_told {} done done 1
    T  crashes    target_before_accept {} ".*the connection was closed" - 1
    T  crashes    target_before_apply {} done done 0
    T' crashes    target_before_load "*of 1 replicas have the snapshot*" done done 0
    T' crashes    target_before_section "*of 1 replicas have the snapshot*" done done 0
    T' crashes    target_replica_prepared "*0 of 1 replicas have the slots*" done done 0
    T' crashes    target_replica_takeover "*0 of 1 replicas have taken*" done done 1
    T' fails      target_before_load {} done done 0
    T' fails      target_before_section {} done done 1
    T' fails      target_replica_takeover {} done done 0
    S  "is late"  source_before_fork {} done done 0
    S  "is late"  source_in_child {} done done 0
    S  "is late"  source_before_cut {} done done 0
    S  "is late"  source_before_commit {} done done 1
    S  "is late"  source_before_trim {} done done 0
    T  "is late"  target_before_section {} done done 0
    T  "is late"  target_before_apply {} done done 0
    T  "is late"  target_before_prepared {} done done 0
    T  "is late"  target_before_takeover {} done done 1
    T  "is late"  target_after_takeover {} done done 0
    T' "is late"  target_before_section {} done done 0
    T' "is late"  target_before_apply {} done done 0
}
set ::at_failpoint {crashes fails "is late"}

set all [expr {[info exists ::env(SLOTMIG_MATRIX)] && $::env(SLOTMIG_MATRIX) eq "all"}]
set ::todo {}
foreach {who action step meanwhile at_source at_target always} $::rows {
    if {$all || $always} {lappend ::todo [list $who $action $step $meanwhile $at_source $at_target]}
}

for {set left ""} {$::todo ne "" && $left ne $::todo} {} {
    set left $::todo
    start_cluster 3 3 {tags {external:skip cluster}} {
        set ::ids {}
        for {set n 0} {$n < 6} {incr n} {lappend ::ids [node_id $n]}
        foreach slot $::still {
            fill_all_types 0 $slot
            # Not what a replica has otherwise: consumers' times, levels of a random graph.
            foreach key [R 0 cluster getkeysinslot $slot 1000] {
                if {[R 0 type $key] in {stream vectorset}} {R 0 del $key}
            }
        }
        for {set failed 0} {!$failed && $::todo ne ""} {} {
            set ::todo [lassign $::todo row]
            lassign $row who action step
            test "[string totitle [dict get $::names $who] 0 0] $action [expr {$action in $::at_failpoint ? "at $step" : "while a job is $step"}]" {
                set failed 1
                alone {run_row {*}$row}
                set failed 0
            }
        }
    }
}

start_cluster 3 3 {tags {external:skip cluster}} {
    test "The target's replica has all of a small snapshot and its only answer is lost: the job goes on" {
        set ::ids {}
        for {set n 0} {$n < 6} {incr n} {lappend ::ids [node_id $n]}
        alone {
            begin_row
            fill_strings 0 11 100
            pause_process [node_pid 5]
            set id [migrate 0 2 11 11]
            wait_reason $id "*of 1 replicas have the snapshot*"
            R 2 client kill type replica
            resume_process [node_pid 5]
            wait_migrated 0 2 $id
            wait_replica_same 2 5
        }
    }
}
