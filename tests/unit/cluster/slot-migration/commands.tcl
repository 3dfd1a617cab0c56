# The commands: what they take, what they refuse and why, what they tell.

source tests/support/slot_migration.tcl

set ::fields {
    id slots source target role state reason attempt keys-total keys-done bytes-total bytes-done rate eta-ms
    stream-bytes stream-lag-bytes retries interruptions came-anew last-error created-ms started-ms ended-ms phase-ms write-pause-us
    take-over-us fsync-us hand-off-us
    held held-for paused rate-limit wait-replicas timeout writers-rate-limit trimmed
    snapshot-by forked-slots forked-because
}

proc assert_refused {why n args} {
    assert_error $why {R $n cluster migrate-slots {*}$args}
    assert_equal 0 [jobs_running $n]
}

start_cluster 3 0 {tags {external:skip cluster}} {
    set id0 [node_id 0]
    set id1 [node_id 1]
    set id2 [node_id 2]

    test "MIGRATE-SLOTS refuses what is no proper request, and says what is" {
        fresh
        foreach {why args} {
            "*wrong number of arguments*"                       {}
            "*syntax error at 'slots'*SLOTSRANGE*NODE*"         {slots 1 2 node ID2}
            "*wrong number of arguments*"                       {slotsrange 1 2 node}
            "*no slot range*SLOTSRANGE start end*"              {slotsrange node ID2 node ID2 node ID2}
            "*NODE node-id must follow*"                        {slotsrange 1 2 3 4 5 6 7 8 node}
            "*NODE node-id must follow*"                        {slotsrange 1 2 3 4 5 6 7 8}
            "*NODE node-id must follow*"                        {slotsrange 1 2 to ID2}
            "*invalid slot range at '3'*0 to 16383*"            {slotsrange 1 2 3 node ID2}
            "*invalid slot range at '16380'*0 to 16383*"        {slotsrange 16380 16384 node ID2}
            "*invalid slot range at '-1'*0 to 16383*"           {slotsrange -1 2 node ID2}
            "*invalid slot range at '1x'*"                      {slotsrange 1x 2 node ID2}
            "*slot range 7-5 ends before it starts*"            {slotsrange 7 5 node ID2}
            "*slot 5 is named twice*"                           {slotsrange 1 5 5 9 node ID2}
            "*slot 2 is named twice*"                           {slotsrange 1 5 node ID2 slotsrange 2 2 node ID1}
            "*unknown node 0123*CLUSTER NODES*"                 {slotsrange 1 2 node 0123}
            "*syntax error at 'extra'*"                         {slotsrange 1 2 node ID2 extra}
        } {
            assert_refused $why 0 {*}[string map [list ID1 $id1 ID2 $id2] $args]
        }
    }

    test "MIGRATE-SLOTS refuses slots that are not the node's, and names the owner" {
        fresh
        assert_refused "*slot 6000 is served by node $id1*" 0 slotsrange 6000 6001 node $id2
        assert_refused "*slot 5462 is served by node $id1*" 0 slotsrange 5461 5462 node $id2
        # The target is asked: it forwards, unless it cannot know whom to ask.
        assert_refused "*Slot 12000 is served by this node already*" 2 slotsrange 12000 12000 node $id2
        assert_refused "*Slots 1 and 6000 have different owners*" 2 slotsrange 1 1 6000 6000 node $id2
        assert_refused "*this node is among the targets*" 2 slotsrange 1 1 node $id2 slotsrange 2 2 node $id1
    }

    test "MIGRATE-SLOTS that the target gets is forwarded to the owner, with its refusals" {
        fresh
        R 0 set [key_in 5 k] v
        set id [lindex [R 2 cluster migrate-slots slotsrange 5 6 node $id2] 0]
        wait_migrated 0 2 $id
        assert_equal v [R 2 get [key_in 5 k]]
        failpoint 2 target_before_accept fail
        assert_error "*owner answers*$id2*refuses*target_before_accept*" {R 2 cluster migrate-slots slotsrange 7 7 node $id2}
    }

    test "DRYRUN tells what would be moved, as owner and as target, and starts nothing" {
        fresh
        fill_strings 0 {5 6 7} 1000 100
        R 0 set [key_in 9 k] x
        set jobs [llength [R 0 cluster slot-migrations]]
        R 1 config set maxmemory 1gb
        foreach n {0 2} {
            set plan [R $n cluster migrate-slots slotsrange 5 7 9 9 node $id2 dryrun]
            assert_equal 1 [llength $plan]
            set plan [lindex $plan 0]
            assert_equal {5-7 9} [dict get $plan slots]
            assert_equal $id2 [dict get $plan target]
            assert_equal [expr {[R 0 dbsize]}] [dict get $plan keys]
            assert_range [dict get $plan bytes] 100000 1000000
            assert_range [dict get $plan memory] 100000 1000000
            assert_equal -1 [dict get $plan target-headroom]
        }
        set plan [R 0 cluster migrate-slots slotsrange 5 5 node $id2 slotsrange 9 9 node $id1 hold dryrun rate 5]
        assert_equal {5 9} [lmap block $plan {dict get $block slots}]
        assert_equal [list $id2 $id1] [lmap block $plan {dict get $block target}]
        assert_range [dict get [lindex $plan 1] target-headroom] 900000000 1073741824
        R 1 config set maxmemory 1
        assert_error "*the target $id1*maxmemory*" {R 0 cluster migrate-slots slotsrange 5 5 node $id2 slotsrange 6 6 node $id1 dryrun}
        R 1 config set maxmemory 0
        assert_error "*slot 6000 is served by node*" {R 0 cluster migrate-slots slotsrange 6000 6000 node $id2 dryrun}
        assert_error "*syntax error at 'dryrun'*" {R 0 cluster migrate-slots slotsrange 5 5 node $id2 dryrun dryrun}
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 6 6]
        assert_error "*slot 6 is in slot migration $id*" {R 0 cluster migrate-slots slotsrange 5 6 node $id2 dryrun}
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        R 1 set [key_in 6000 own] x
        foreach n {0 1 2} {assert_equal 0 [jobs_running $n]}
        assert_equal [expr {$jobs+1}] [llength [R 0 cluster slot-migrations]]
    }

    test "Slots in a job are refused to other jobs, SETSLOT, DELSLOTS and FLUSHSLOTS, at both nodes" {
        fresh
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 7]
        wait_job_state 0 $id streaming
        assert_error "*slot 7 is in slot migration $id already*" {R 0 cluster migrate-slots slotsrange 7 8 node $id1}
        assert_error "*slot 6 is in slot migration $id already*" {R 0 cluster migrate-slots slotsrange 6 6 node $id2}
        foreach n {0 2} {
            assert_error "*lot 6 is in slot migration $id*CANCEL-SLOT-MIGRATIONS ID $id*" {R $n cluster setslot 6 node $id1}
        }
        assert_error "*lot 6 is in slot migration $id*" {R 0 cluster setslot 6 migrating $id1}
        assert_error "*lot 6 is in slot migration $id*" {R 2 cluster setslot 6 importing $id0}
        assert_error "*lot 5 is in slot migration $id*" {R 0 cluster delslots 5}
        assert_error "*lot 5 is in slot migration $id*" {R 0 cluster delslotsrange 1 9}
        assert_equal streaming [job_field 0 $id state]
        # Other slots are free.
        R 0 cluster setslot 8 migrating $id2
        R 0 cluster setslot 8 stable
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        R 2 cluster setslot 6 migrating $id1
        R 2 cluster setslot 6 stable
    }

    test "Slots in a SETSLOT state are refused, at both nodes, with the remedy" {
        fresh
        R 0 cluster setslot 5 migrating $id1
        assert_refused "*slot 5 is in a CLUSTER SETSLOT state*SETSLOT 5 STABLE*" 0 slotsrange 4 6 node $id2
        R 0 cluster setslot 5 stable
        R 2 cluster setslot 6 importing $id0
        assert_refused "*$id2*refuses*slot 6 is in a CLUSTER SETSLOT state there*SETSLOT 6 STABLE*" 0 slotsrange 4 6 node $id2
        R 2 cluster setslot 6 stable
        move_slots 0 2 4 6
    }

    test "Leftover keys at the target are refused with the slot, and nothing happens to them" {
        fresh
        R 2 cluster setslot 5 importing $id0
        R 2 asking
        R 2 set [key_in 5 leftover] x
        R 2 cluster setslot 5 stable
        assert_refused "*slot 5 has 1 leftover keys there*GETKEYSINSLOT*" 0 slotsrange 4 6 node $id2
        assert_equal [list [key_in 5 leftover]] [R 2 cluster getkeysinslot 5 10]
        assert_equal 0 [jobs_running 2]
        R 2 flushall
        move_slots 0 2 4 6
    }

    test "A target without room for the slots is refused, with the numbers" {
        fresh
        for {set i 0} {$i < 20} {incr i} {R 0 set [key_in 5 big$i] [string repeat x 1000000]}
        R 2 config set maxmemory [expr {[status [Rn 2] used_memory]+5000000}]
        assert_refused "*$id2*refuses*it uses * of maxmemory * the slots need about * more: raise maxmemory*" 0 slotsrange 4 6 node $id2
        R 2 config set maxmemory 0
        move_slots 0 2 4 6
    }

    test "A target that cannot save its data is refused" {
        fresh
        R 2 config set stop-writes-on-bgsave-error yes
        R 2 config set save "3600 1"
        R 2 set [key_in 16000 k] x
        R 2 config set rdb-key-save-delay 10000000
        R 2 bgsave
        exec kill -9 [node_children 2]
        wait_for_condition 500 10 {[status [Rn 2] rdb_last_bgsave_status] eq "err"} else {fail "the save does not fail"}
        R 2 config set rdb-key-save-delay 0
        assert_refused "*$id2*refuses*does not accept writes*" 0 slotsrange 4 6 node $id2
        R 2 config set save ""
        R 2 config set stop-writes-on-bgsave-error no
        move_slots 0 2 4 6
        R 2 save
    }

    test "A job waits for another child process, and says for which" {
        fresh
        R 0 set [key_in 4000 k] x
        R 0 config set rdb-key-save-delay 100000000
        R 0 bgsave
        R 0 config set cluster-slot-migration-snapshot fork
        set id [migrate 0 2 5 6]
        wait_for_condition 500 10 {[string match "*child process*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
        assert_equal waiting [job_field 0 $id state]
        # The saver's thread needs none.
        R 0 config set cluster-slot-migration-snapshot auto
        move_slots 0 2 4000 4000
        assert_equal waiting [job_field 0 $id state]
        R 0 config set rdb-key-save-delay 0
        exec kill -9 [node_children 0]
        wait_migrated 0 2 $id
        R 0 config set save ""
        R 0 save
    }

    test "A node of upstream's is refused by name, as target and as owner" {
        fresh
        with_vanilla_node {
            set other [$vanilla cluster myid]
            assert_refused "*the target $other (127.0.0.1:*) runs a server that cannot take slots this way: upgrade it*" 0 slotsrange 5 5 node $other
            assert_error "*unknown subcommand*" {$vanilla cluster migrate-slots slotsrange 1 1 node $id0}
            # With a slot of its own, got the old way.
            $vanilla cluster setslot 5461 importing $id0
            R 0 cluster setslot 5461 migrating $other
            $vanilla cluster setslot 5461 node $other
            R 0 cluster setslot 5461 node $other
            wait_for_condition 500 10 {[string match "* 5461" [string trim [lsearch -inline [split [R 2 cluster nodes] "\n"] "$other*"]]]} else {
                fail "node 2 does not see the owner of slot 5461: [R 2 cluster nodes]"
            }
            assert_error "*owner runs a server that cannot give slots away this way: upgrade it*" {
                R 2 cluster migrate-slots slotsrange 5461 5461 node $id2
            }
            assert_refused "*slot 5461 is served by node $other*" 0 slotsrange 5461 5461 node $id2
            R 0 cluster setslot 5461 importing $other
            R 0 cluster setslot 5461 node $id0
            # It may have become a replica of node 0 by now, for want of slots.
            catch {$vanilla cluster setslot 5461 node $id0}
            wait_for_condition 500 10 {[slot_owner 2 5461] eq 0} else {fail "slot 5461 did not come back"}
        }
    }

    test "The commands are refused in transactions and scripts" {
        fresh
        R 0 multi
        assert_error "*not allowed inside a transaction*" {R 0 cluster migrate-slots slotsrange 5 5 node $id2}
        R 0 discard
        R 0 multi
        assert_error "*not allowed inside a transaction*" {R 0 cluster cancel-slot-migrations all}
        R 0 discard
        assert_error "*not allowed from script*" {R 0 eval {return redis.call('cluster','migrate-slots','slotsrange',5,5,'node',ARGV[1])} 0 $id2}
        assert_equal 0 [jobs_running 0]
    }

    test "CLUSTER SLOTMIG is for the nodes only" {
        fresh
        foreach command {
            {slotmig ask 0123 1 2} {slotmig attach 0123 stream}
            {slotmig request slotsrange 1 1 node x} {slotmig offer 1 x y 0 0 1 1} {slotmig nonsense}
        } {
            assert_error "*for the nodes of the cluster only*MIGRATE-SLOTS*" {R 0 cluster {*}$command}
        }
        assert_error "*no fail point*" {R 0 debug slotmig failpoint nonsense pause}
        assert_error "*no fail point*" {R 0 debug slotmig failpoint nonsense}
        assert_error "*no action*" {R 0 debug slotmig failpoint source_before_cut nonsense}
        assert_error "*not an integer*" {R 0 debug slotmig failpoint source_before_cut fail x}
        assert_error "*unknown subcommand*" {R 0 debug slotmig}
        assert_match "*SLOTMIG FAILPOINT*" [R 0 debug help]
        assert_error "*unknown subcommand*" {internal 0 cluster slotmig nonsense}
        assert_error "*Unknown slot migration*" {internal 0 cluster slotmig attach [string repeat 0 40] stream}
        assert_error "*do not understand each other*" {internal 0 cluster slotmig offer 99 [string repeat 0 40] $id2 0 0 5 5}
    }

    test "SLOT-MIGRATIONS tells the same fields in RESP2 and RESP3, at both nodes, during the job and after" {
        fresh
        fill_strings 0 {5 6} 100
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 6]
        wait_job_state 0 $id streaming
        R 0 set [key_in 5 k] x
        foreach round {running ended} {
            foreach {n role} {0 source 2 target} {
                set job [job $n $id]
                assert_equal [list {*}$::fields] [dict keys $job]
                foreach {field value} [list id $id slots 5-6 source $id0 target $id2 role $role keys-total 100 keys-done 100 last-error ""] {
                    assert_equal $value [dict get $job $field] $field
                }
                assert_morethan [dict get $job bytes-done] 1000
                assert_equal [dict get $job bytes-done] [dict get $job bytes-total]
                assert_morethan [dict get $job created-ms] 1600000000000
                assert_morethan_equal [dict get $job started-ms] [dict get $job created-ms]
                set c [connect $n]
                $c hello 3
                set other [lindex [$c cluster slot-migrations id $id] 0]
                assert_equal [dict keys $job] [dict keys $other]
                assert_equal [dict keys [dict get $job phase-ms]] [dict keys [dict get $other phase-ms]]
                $c close
                if {$round eq "ended"} {
                    assert_equal done [dict get $job state]
                    assert_morethan_equal [dict get $job ended-ms] [dict get $job started-ms]
                    assert_equal 1 [dict get $job attempt]
                }
            }
            if {$round eq "running"} {
                assert_equal streaming [job_field 0 $id state]
                assert_equal following [job_field 2 $id state]
                failpoint 0 source_before_cut off
                wait_migrated 0 2 $id
            }
        }
        assert_equal 101 [job_field 0 $id trimmed]
        assert_morethan [job_field 0 $id write-pause-us] 0
        # The phases' times add up to the job's.
        set sum 0
        dict for {phase ms} [job_field 0 $id phase-ms] {
            assert_not_equal -1 [lsearch {offered waiting snapshot streaming fenced committed trimming} $phase]
            incr sum $ms
        }
        assert_equal [expr {[job_field 0 $id ended-ms]-[job_field 0 $id created-ms]}] $sum
    }

    test "SLOT-MIGRATIONS lists newest first, keeps as many as configured, and knows ids" {
        fresh
        R 0 config set cluster-slot-migration-log-max-len 0
        wait_job_state 2 [migrate 0 2 1 1] done
        wait_for_condition 500 10 {[R 0 cluster slot-migrations] eq ""} else {fail "the log is not empty: [R 0 cluster slot-migrations]"}
        R 0 config set cluster-slot-migration-log-max-len 3
        set ids {}
        foreach slot {10 11 12 13 14} {set ids [linsert $ids 0 [move_slots 0 2 $slot $slot]]}
        set listed {}
        foreach job [R 0 cluster slot-migrations] {lappend listed [dict get $job id]}
        assert_equal [lrange $ids 0 2] $listed
        # Nothing runs, and it counts.
        R 0 config set cluster-slot-migration-log-max-len 2
        assert_equal 2 [llength [R 0 cluster slot-migrations]]
        R 0 config set cluster-slot-migration-log-max-len 3
        assert_error "*Unknown slot migration '[lindex $ids 4]'*SLOT-MIGRATIONS*" {R 0 cluster slot-migrations id [lindex $ids 4]}
        assert_error "*Unknown slot migration 'x'*" {R 0 cluster slot-migrations id x}
        assert_error "*syntax*" {R 0 cluster slot-migrations nonsense}
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 15 15]
        assert_equal $id [dict get [lindex [R 0 cluster slot-migrations] 0] id]
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        R 0 config set cluster-slot-migration-log-max-len 128
    }

    test "CANCEL-SLOT-MIGRATIONS takes an id or ALL, and counts" {
        fresh
        assert_equal 0 [R 0 cluster cancel-slot-migrations all]
        assert_error "*Unknown slot migration*" {R 0 cluster cancel-slot-migrations id [string repeat 0 40]}
        assert_error "*syntax*" {R 0 cluster cancel-slot-migrations nonsense}
        failpoint 0 source_before_cut pause
        set a [migrate 0 2 5 6]
        set b [migrate 0 1 7 8]
        set c [migrate 0 2 9 9]
        assert_equal 1 [R 0 cluster cancel-slot-migrations id $b]
        assert_equal 2 [R 0 cluster cancel-slot-migrations all]
        foreach id [list $a $b $c] {assert_equal cancelled [job_field 0 $id state]}
        foreach n {1 2} {wait_for_condition 500 10 {[jobs_running $n] == 0} else {fail "node $n goes on"}}
    }

    test "If one target of a command refuses, none of its jobs goes on" {
        fresh
        failpoint 2 target_before_accept fail
        assert_error "*$id2*refuses*" {R 0 cluster migrate-slots slotsrange 5 5 node $id1 slotsrange 6 6 node $id2 slotsrange 7 7 node $id1}
        foreach n {0 1 2} {wait_for_condition 500 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}}
        foreach slot {5 6 7} {assert_equal 0 [slot_owner 1 $slot]}
        failpoint 2 target_before_accept off
        move_slots 0 1 5 7
    }

    test "A command whose targets do not answer can be cancelled" {
        fresh
        stop_node 2
        set rd [redis_deferring_client 0]
        $rd cluster migrate-slots slotsrange 6 6 node $id2 slotsrange 5 5 node $id1
        wait_for_condition 500 10 {[llength [R 0 cluster slot-migrations]] >= 2 && [jobs_running 1] == 1} else {fail "no jobs"}
        set cancelled [R 0 cluster cancel-slot-migrations all]
        catch {$rd read} error
        assert_match "*cancelled*" $error
        $rd close
        continue_node 2
        foreach n {0 1 2} {wait_for_condition 1500 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}}
        move_slots 0 2 5 6
        assert_equal 2 $cancelled
    }

    test "A client that goes away before its answer does no harm" {
        fresh
        stop_node 2
        set rd [redis_deferring_client 0]
        $rd cluster migrate-slots slotsrange 6 6 node $id2
        wait_for_condition 500 10 {[jobs_running 0] == 1} else {fail "no job"}
        $rd close
        continue_node 2
        wait_for_condition 1500 10 {[jobs_running 0] == 0} else {fail "the job does not end"}
        assert_equal done [dict get [lindex [R 0 cluster slot-migrations] 0] state]
        wait_cluster_agrees
        assert_equal 2 [slot_owner 1 6]
    }

    test "The directives can be read, set, refused and rewritten" {
        fresh
        foreach {name default other shown bad} {
            cluster-slot-migration-handoff-max-lag-bytes 1048576 2097152 2mb -1
            cluster-slot-migration-write-pause-timeout 10000 5000 5000 0
            cluster-slot-migration-buffer-limit 1073741824 536870912 512mb 1
            cluster-slot-migration-log-max-len 128 10 10 -1
        } {
            assert_equal $default [lindex [R 0 config get $name] 1]
            R 0 config set $name $other
            assert_equal $other [lindex [R 0 config get $name] 1]
            assert_error "*$name*" {R 0 config set $name $bad}
            R 0 config rewrite
            assert_match "*\n$name $shown\n*" "[exec cat [srv 0 config_file]]\n" $name
            R 0 config set $name $default
        }
        R 0 config rewrite
    }

    test "CLUSTER INFO, INFO, HELP, COMMAND and ACL know of migrations" {
        fresh
        fill_strings 0 {5} 10
        foreach field {done failed cancelled} {set $field [CI 0 cluster_slot_migrations_$field]}
        set out [CI 0 cluster_slot_migration_keys_exported]
        set in [CI 2 cluster_slot_migration_keys_imported]
        set bytes_out [CI 0 cluster_slot_migration_bytes_exported]
        set bytes_in [CI 2 cluster_slot_migration_bytes_imported]
        set retried [CI 0 cluster_slot_migrations_retried]
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 5]
        assert_equal {1 0} [list [CI 0 cluster_slot_migrations_exporting] [CI 0 cluster_slot_migrations_importing]]
        assert_equal {0 1} [list [CI 2 cluster_slot_migrations_exporting] [CI 2 cluster_slot_migrations_importing]]
        R 0 cluster cancel-slot-migrations all
        failpoint 0 source_before_cut off
        wait_for_condition 500 10 {[jobs_running 2] == 0} else {fail "the target goes on"}
        move_slots 0 2 5 5
        assert_equal [expr {$cancelled+1}] [CI 0 cluster_slot_migrations_cancelled]
        assert_equal [expr {$done+1}] [CI 0 cluster_slot_migrations_done]
        assert_equal $failed [CI 0 cluster_slot_migrations_failed]
        assert_equal [expr {$out+10}] [CI 0 cluster_slot_migration_keys_exported]
        assert_equal $retried [CI 0 cluster_slot_migrations_retried]
        set bytes [dict get [lindex [R 0 cluster slot-migrations] 0] bytes-done]
        assert_equal [expr {$bytes_out+$bytes}] [CI 0 cluster_slot_migration_bytes_exported]
        assert_equal [expr {$bytes_in+$bytes}] [CI 2 cluster_slot_migration_bytes_imported]
        assert_equal [expr {$in+10}] [CI 2 cluster_slot_migration_keys_imported]
        assert_morethan [CI 0 cluster_slot_migration_longest_write_pause_us] 0
        R 0 config resetstat
        assert_equal 0 [CI 0 cluster_slot_migration_longest_write_pause_us]
        assert_not_equal "" [getInfoProperty [R 0 info server] slot_migration_version]
        foreach word {MIGRATE-SLOTS SLOT-MIGRATIONS CANCEL-SLOT-MIGRATIONS} {
            assert_match "*$word*" [R 0 cluster help]
            set name [string tolower cluster|$word]
            assert_equal $name [lindex [R 0 command info $name] 0 0]
            assert_equal 2 [llength [R 0 command docs $name]]
            # Part of what may be granted.
            assert_not_equal -1 [lsearch [R 0 acl cat slow] $name] $name
        }
        foreach name {cluster|migrate-slots cluster|cancel-slot-migrations cluster|slotmig} {
            assert_not_equal -1 [lsearch [R 0 acl cat dangerous] $name] $name
        }
        R 0 acl setuser operator on nopass +cluster|slot-migrations
        set c [connect 0]
        $c auth operator any
        assert_equal done [dict get [lindex [$c cluster slot-migrations id [dict get [lindex [R 0 cluster slot-migrations] 0] id]] 0] state]
        assert_error "NOPERM*" {$c cluster migrate-slots slotsrange 6 6 node $id2}
        assert_error "NOPERM*" {$c cluster cancel-slot-migrations all}
        $c close
        R 0 acl deluser operator
    }

    test "A replica that runs an unpatched server is refused by name, on both sides" {
        fresh
        with_vanilla_node {
            $vanilla cluster replicate $id0
            wait_for_condition 1000 10 {[getInfoProperty [$vanilla info replication] master_link_status] eq "up"} else {fail "no replica"}
            assert_refused "*$id0 has a replica at*cannot take part*" 0 slotsrange 5 5 node $id2
            assert_refused "*the target $id0*refuses*has a replica at*" 2 slotsrange 12000 12000 node $id0
        }
    }

    # The last one: it turns a node into a replica.
    test "A replica is refused by name as source and as target" {
        fresh
        move_slots 1 0 5462 10922
        wait_for_condition 500 10 {[string match "*slave*" [cluster_get_myself 1]] || [R 1 dbsize] == 0} else {fail "no"}
        if {[dict get [cluster_get_myself 1] slaveof] ne $id0} {R 1 cluster replicate $id0}
        wait_for_condition 1000 10 {[status [Rn 1] master_link_status] eq "up"} else {fail "no replica"}
        wait_for_condition 500 10 {[dict get [lindex [lsearch -all -inline [get_cluster_nodes 2] "*id $id1*"] 0] slaveof] eq $id0} else {fail "unseen"}
        assert_refused "*is a replica: name its master*" 2 slotsrange 12000 12000 node $id1
        assert_error "*this node is a replica*" {R 1 cluster migrate-slots slotsrange 5 5 node $id2}
    }
}
