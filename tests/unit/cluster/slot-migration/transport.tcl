# The job's connections work wherever a replica's do, with nothing to configure:
# over other addresses, with passwords, access lists and limits for clients.

source tests/support/slot_migration.tcl

set ::slots {5 6}

proc fill {} {
    foreach slot $::slots {fill_all_types 0 $slot}
    fill_strings 0 $::slots 2000 1000
}

# On the connection that is there: others may not be allowed.
proc failpoint_by_R {n name action} {
    R $n debug slotmig failpoint $name $action
}

proc wait_not_behind {id} {
    wait_for_condition 500 10 {[job_field 0 $id stream-lag-bytes] == 0 && [job_field 0 $id stream-bytes] > 0} else {
        fail "the target lags: [job 0 $id]"
    }
}

# Move the slots under these settings, from the first connection to the end, with
# a write on the way, and see that all keys arrive. The check runs while the
# job streams; $id is its id there.
proc moves_under {settings {check {}}} {
    fresh
    fill
    set before [slots_dump 0 $::slots]
    with_config $settings {
        failpoint_by_R 0 source_before_cut pause
        set id [migrate 0 1 5 6]
        wait_job_state 0 $id streaming
        R 0 set [key_in 5 live] streamed
        R 0 del [key_in 6 str:emb]
        wait_not_behind $id
        uplevel 1 [list set id $id]
        uplevel 1 $check
        failpoint_by_R 0 source_before_cut off
        wait_job_state 0 $id done
        wait_job_state 1 $id done
        assert_equal 1 [job_field 0 $id attempt]
    }
    wait_cluster_agrees
    dict unset before [key_in 6 str:emb]
    set after [slots_dump 1 $::slots]
    assert_equal streamed [R 1 get [key_in 5 live]]
    dict unset after [key_in 5 live]
    assert_same_dump $before $after
    assert_equal 0 [R 0 dbsize]
}

proc wait_failed {n id why} {
    wait_for_condition 1500 10 {[job_ended [job_field $n $id state]]} else {fail "the job does not end at node $n: [job $n $id]"}
    assert_equal failed [job_field $n $id state]
    assert_match $why [job_field $n $id last-error]
}

# How many clients node n has.
proc clients_of {n} {
    llength [split [string trim [R $n client list type normal]] \n]
}

# R's own connections act for this user.
proc R_is {user} {
    foreach n {0 1} {R $n auth $user secret}
}

# Run the body with the users of ACL lines on both nodes, R being the operator.
proc with_users {lines body} {
    foreach n {0 1} {
        R $n acl setuser operator on >secret ~* &* +@all
        R $n auth operator secret
        foreach line $lines {R $n acl setuser {*}$line}
        R $n acl log reset
    }
    set failed [catch {uplevel 1 $body} error options]
    foreach n {0 1} {
        R $n auth operator secret
        R $n acl setuser default reset on nopass ~* &* +@all
        R $n auth default any
        foreach user [R $n acl users] {
            if {$user ne "default"} {R $n acl deluser $user}
        }
    }
    if {$failed} {return -options $options $error}
}

start_cluster 2 0 {tags {external:skip cluster}} {
    # ---- addresses ----

    test "A job goes to the announced address and ports, through what is between" {
        fresh
        set ways {}
        foreach n {0 1} {
            foreach what {port bus} {set $what$n [find_available_port $::baseport $::portcount]}
            lappend ways 127.0.0.2 [set port$n] 127.0.0.1 [node_port $n] 127.0.0.2 [set bus$n] 127.0.0.1 [expr {[node_port $n]+10000}]
            lappend settings $n [list cluster-announce-ip 127.0.0.2 cluster-announce-port [set port$n] cluster-announce-bus-port [set bus$n]]
        }
        with_forwarders $ways {
            with_config $settings {
                foreach n {0 1} {
                    wait_for_condition 500 10 {[regexp -all {127\.0\.0\.2:} [R $n cluster nodes]] == 2} else {
                        fail "node $n does not know the announced addresses: [R $n cluster nodes]"
                    }
                }
                moves_under {} {
                    assert_equal 127.0.0.2 [lindex [connections_to 1 $port0] 0 2]
                    assert_equal {} [connections_to 1 [node_port 0]]
                }
                assert_error "MOVED 5 127.0.0.2:$port1" {R 0 get [key_in 5 str:int]}
            }
            foreach n {0 1} {
                wait_for_condition 500 10 {![string match "*127.0.0.2*" [R $n cluster nodes]]} else {fail [R $n cluster nodes]}
            }
        }
        wait_cluster_agrees
    }

    foreach {type endpoint} {hostname node1.invalid unknown-endpoint "" ip 127.0.0.1} {
        test "With hostnames announced and $type preferred a job goes by the IP address" {
            set settings {}
            foreach n {0 1} {
                lappend settings $n [list cluster-announce-hostname node$n.invalid cluster-preferred-endpoint-type $type]
            }
            fresh
            with_config $settings {
                foreach n {0 1} {
                    wait_for_condition 500 10 {[regexp -all {node[01]\.invalid} [R $n cluster nodes]] == 2} else {fail [R $n cluster nodes]}
                }
                moves_under {} {
                    assert_equal 127.0.0.1 [lindex [connections_to 1 [node_port 0]] 0 2]
                }
                assert_error "MOVED 5 $endpoint:[node_port 1]" {R 0 get [key_in 5 str:int]}
            }
        }
    }

    test "A job's connections come from bind-source-addr" {
        # Without cluster-announce-ip upstream's nodes take the source for the node's address.
        set settings {0 {cluster-announce-ip 127.0.0.1 bind-source-addr 127.0.0.3} 1 {cluster-announce-ip 127.0.0.1 bind-source-addr 127.0.0.4}}
        moves_under $settings {
            assert_equal 127.0.0.4 [lindex [connections_to 1 [node_port 0]] 0 0]
        }
        # As a replica's link, it goes without an address that is not the node's.
        moves_under {0 {bind-source-addr 203.0.113.1} 1 {bind-source-addr 203.0.113.1}} {
            assert_equal 127.0.0.1 [lindex [connections_to 1 [node_port 0]] 0 0]
        }
    }

    # ---- passwords and users ----

    foreach {case at0 at1} {
        "without masterauth" {requirepass one} {requirepass one}
        "that differ" {requirepass one} {requirepass two}
        "and a wrong masterauth" {requirepass one masterauth wrong masteruser nobody} {requirepass two masterauth wrong masteruser nobody}
        "at the source only" {requirepass one} {}
        "at the target only" {} {requirepass two}
    } {
        test "Passwords $case do not matter to a job" {
            moves_under [list 0 $at0 1 $at1]
        }
    }

    test "A user that may do nothing, as masteruser, and no other than the operator, do not matter to a job" {
        fresh
        fill
        set before [slots_dump 0 $::slots]
        with_users {
            {default off resetpass -@all resetkeys resetchannels}
            {nobody on >secret -@all}
            {operator -cluster +cluster|migrate-slots +cluster|slot-migrations +cluster|myid}
        } {
            with_config {0 {masteruser nobody masterauth secret} 1 {masteruser nobody masterauth secret}} {
                assert_error "NOPERM*" {R 0 cluster slotmig request}
                foreach n {0 1} {R $n acl log reset}
                set id [migrate 0 1 5 6]
                wait_job_state 0 $id done
                wait_job_state 1 $id done
                foreach n {0 1} {assert_equal {} [R $n acl log]}
            }
        }
        wait_cluster_agrees
        assert_same_dump $before [slots_dump 1 $::slots]
    }

    test "MIGRATE-SLOTS is for users who may, at the node that is asked" {
        fresh
        set node1 [node_id 1]
        with_users {
            {mover on >secret -@all +cluster|migrate-slots}
            {looker on >secret -@all +cluster|slot-migrations}
            {admin on >secret ~* +@all -cluster|migrate-slots}
        } {
            foreach user {looker admin} {
                R_is $user
                assert_error "NOPERM*cluster|migrate-slots*" {R 0 cluster migrate-slots slotsrange 5 6 node $node1}
                assert_error "NOPERM*cluster|migrate-slots*" {R 1 cluster migrate-slots slotsrange 5 6 node $node1}
            }
            R_is looker
            assert_morethan [llength [R 0 cluster slot-migrations]] 0
            foreach n {0 1} {
                R_is mover
                assert_error "NOPERM*" {R $n cluster slot-migrations}
                set id [R $n cluster migrate-slots slotsrange [expr {5+$n}] [expr {5+$n}] node $node1]
                R_is operator
                wait_job_state 0 $id done
                wait_job_state 1 $id done
            }
        }
    }

    test "The commands between the nodes are for nobody else" {
        foreach n {0 1} {
            foreach args {offer {attach x stream} {ask x} {request slotsrange 5 6} {failpoint target_prepared fail}} {
                assert_error "*for the nodes of the cluster only*" {R $n cluster slotmig {*}$args}
            }
        }
    }

    # ---- limits for clients ----

    test "A job that finds no room under maxclients fails and says so, the next succeeds" {
        fresh
        fill
        foreach n {0 1} {set footprint$n [footprint $n]}
        with_config {1 {maxclients 1}} {
            assert_error "*the target [node_id 1] (127.0.0.1:*) refuses: max number of clients*" {migrate 0 1 5 6}
            assert_equal 0 [jobs_running 0]
        }
        with_config {0 {maxclients 1}} {
            set id [migrate 0 1 5 6]
            wait_failed 1 $id "cannot attach to the source: *max number of clients*"
            wait_failed 0 $id "*max number of clients*"
        }
        foreach n {0 1} {wait_no_leftovers $n [set footprint$n]}
        moves_under {}
    }

    test "Once a job has its connections they count for no limit of clients" {
        moves_under {} {
            foreach n {0 1} {
                # R's and no other: the job's would show, had they stayed clients.
                assert_equal 1 [clients_of $n]
                R $n config set maxclients 1
            }
            R 0 set [key_in 5 live] streamed
            wait_not_behind $id
            foreach n {0 1} {R $n config set maxclients 10000}
        }
    }

    test "CLIENT KILL of all clients does not end a job" {
        moves_under {} {
            foreach n {0 1} {
                foreach type {normal master replica pubsub} {R $n client kill type $type}
                R $n client kill user default skipme yes
                foreach connection [connections_to 1 [node_port 0]] {
                    lassign $connection ip port
                    assert_error "*No such client*" {R $n client kill $ip:$port}
                }
            }
            assert_equal streaming [job_field 0 $id state]
            R 0 set [key_in 5 live] streamed
            wait_not_behind $id
        }
    }

    test "timeout does not end a job that has nothing to say" {
        moves_under {0 {timeout 1} 1 {timeout 1}} {
            # A client that is idle for as long is gone.
            foreach n {0 1} {set idle$n [redis_deferring_client -$n]}
            wait_for_condition 500 20 {[clients_of 0] + [clients_of 1] == 2} else {fail "idle clients stay"}
            foreach n {0 1} {[set idle$n] close}
            assert_equal streaming [job_field 0 $id state]
            assert_equal following [job_field 1 $id state]
        }
    }

    # Megabytes that wait in the source for a target that does not read.
    proc stream_megabytes {id} {
        stop_node 1
        set failed [catch {
            for {set i 0} {$i < 10} {incr i} {R 0 set [key_in 5 live] [string repeat 0123456789abcdef 100000]}
            R 0 set [key_in 5 live] streamed
            assert_morethan [job_field 0 $id stream-lag-bytes] 10000000
        } error options]
        continue_node 1
        if {$failed} {return -options $options $error}
        wait_not_behind $id
    }

    test "client-output-buffer-limit is not for what a job has to send" {
        set limits "normal 1000000 1000000 1 slave 1000000 1000000 1 pubsub 1000000 1000000 1"
        moves_under [list 0 [list client-output-buffer-limit $limits] 1 [list client-output-buffer-limit $limits]] {
            stream_megabytes $id
        }
    }

    test "maxmemory-clients evicts clients, not a job's connections" {
        foreach n {0 1} {
            R $n config resetstat
            R $n client no-evict on
        }
        moves_under {0 {maxmemory-clients 500000} 1 {maxmemory-clients 500000}} {
            stream_megabytes $id
            foreach n {0 1} {assert_equal 0 [status [Rn $n] evicted_clients]}
            # A client that needs as much is evicted.
            set rd [redis_deferring_client 0]
            catch {$rd set [key_in 5 live] [string repeat x 2000000]}
            wait_for_condition 100 20 {[status [Rn 0] evicted_clients] == 1} else {fail "no client is evicted"}
            $rd close
        }
        foreach n {0 1} {R $n client no-evict off}
    }

    test "Clients on a unix socket start a job, write meanwhile and are redirected" {
        fresh
        fill
        set socket0 [srv 0 unixsocket]
        set socket1 [srv -1 unixsocket]
        failpoint 0 source_before_cut pause
        set id [exec src/redis-cli -s $socket0 cluster migrate-slots slotsrange 5 6 node [node_id 1]]
        wait_job_state 0 $id streaming
        assert_equal OK [exec src/redis-cli -s $socket0 set [key_in 5 live] streamed]
        set before [slots_dump 0 $::slots]
        failpoint 0 source_before_cut off
        wait_migrated 0 1 $id
        assert_match "MOVED 5 *:[node_port 1]" [string trim [exec src/redis-cli -s $socket0 get [key_in 5 live]]]
        assert_equal streamed [exec src/redis-cli -s $socket1 get [key_in 5 live]]
        assert_same_dump $before [slots_dump 1 $::slots]
    }
}

# ---- names of commands ----

start_cluster 2 0 {tags {external:skip cluster} overrides {rename-command {SET PUT}}} {
    test "Commands renamed at both nodes are streamed" {
        fresh
        failpoint 0 source_before_cut pause
        set id [migrate 0 1 5 6]
        wait_job_state 0 $id streaming
        R 0 put [key_in 5 live] streamed ex 10000
        R 0 put [key_in 5 other] streamed get
        wait_not_behind $id
        failpoint 0 source_before_cut off
        wait_migrated 0 1 $id
        assert_equal streamed [R 1 get [key_in 5 live]]
        assert_range [R 1 ttl [key_in 5 live]] 9900 10000
        assert_equal streamed [R 1 get [key_in 5 other]]
    }
}

# Start a cluster of two in which one node has settings of its own.
proc start_uneven {at settings code} {
    set common {cluster-enabled yes cluster-ping-interval 100 cluster-node-timeout 3000}
    set options {}
    foreach n {0 1} {lappend options [list tags {external:skip cluster} overrides $common config_lines [expr {$n == $at ? $settings : {}}]]}
    set ::singledb 1
    # The one that is started last is number 0.
    start_server [lindex $options 1] {
        start_server [lindex $options 0] {
            R 0 [cluster_at 0] meet 127.0.0.1 [node_port 1]
            R 0 [cluster_at 0] addslotsrange 0 8191
            R 1 [cluster_at 1] addslotsrange 8192 16383
            foreach n {0 1} {
                wait_for_condition 1000 10 {[string match "*cluster_state:ok*cluster_known_nodes:2*" [R $n [cluster_at $n] info]]} else {
                    fail "no cluster: [R $n [cluster_at $n] info]"
                }
            }
            uplevel 1 $code
        }
    }
}

# How CLUSTER is called at node n.
proc cluster_at {n} {
    expr {[info exists ::cluster_name($n)] ? $::cluster_name($n) : "cluster"}
}

foreach {at title} {0 "at the source only" 1 "at the target only"} {
    start_uneven $at {rename-command {SET PUT}} {
        test "Commands renamed $title are streamed" {
            set set [expr {$at == 0 ? "put" : "set"}]
            set id [migrate 0 1 100 1000]
            wait_job_state 1 $id done
            failpoint 0 source_before_cut pause
            set id [migrate 0 1 5 6]
            wait_job_state 0 $id streaming
            R 0 $set [key_in 5 live] streamed ex 10000
            wait_not_behind $id
            failpoint 0 source_before_cut off
            wait_migrated 0 1 $id
            assert_equal streamed [R 1 get [key_in 5 live]]
            assert_range [R 1 ttl [key_in 5 live]] 9900 10000
        }
    }
}

start_uneven 1 {rename-command {APPEND ADDTO} rename-command {SET APPEND}} {
    test "A command's name that the target has given to another one is not mistaken" {
        R 0 set [key_in 5 live] before
        failpoint 0 source_before_cut pause
        set id [migrate 0 1 5 6]
        wait_job_state 0 $id streaming
        R 0 append [key_in 5 live] :streamed
        wait_not_behind $id
        failpoint 0 source_before_cut off
        wait_migrated 0 1 $id
        assert_equal before:streamed [R 1 get [key_in 5 live]]
    }
}

set ::cluster_name(0) topology
start_uneven 0 {rename-command {CLUSTER topology}} {
    test "A source whose CLUSTER is renamed: the job fails and names the command" {
        set target [R 1 cluster myid]
        set id [lindex [R 0 topology migrate-slots slotsrange 5 6 node $target] 0]
        wait_failed 1 $id "cannot attach to the source: *unknown command*CLUSTER*"
        wait_for_condition 500 10 {[string match "*failed*unknown command*CLUSTER*" [R 0 topology slot-migrations id $id]]} else {
            fail [R 0 topology slot-migrations id $id]
        }
        assert_error "*The slots' owner*unknown command*CLUSTER*" {R 1 cluster migrate-slots slotsrange 5 6 node $target}
    }
}
unset ::cluster_name(0)

set ::cluster_name(1) topology
start_uneven 1 {rename-command {CLUSTER topology}} {
    test "A target whose CLUSTER is renamed refuses, and the refusal names the command" {
        assert_error "*the target*unknown command*CLUSTER*" {R 0 cluster migrate-slots slotsrange 5 6 node [R 1 topology myid]}
        assert_equal 0 [getInfoProperty [R 0 cluster info] cluster_slot_migrations_exporting]
    }
}
unset ::cluster_name(1)

# ---- other addresses ----

# Run the body with servers that listen on this address alone.
proc at_address {ip body} {
    set host $::host
    set ::host $ip
    set failed [catch {uplevel 1 $body} error options]
    set ::host $host
    if {$failed} {return -options $options $error}
}

if {[catch {close [socket -server accept -myaddr ::1 0]}]} {
    test "NOTE: no IPv6 on this machine: jobs over it are not tested" {}
} else {
    at_address ::1 {
        start_cluster 2 0 {tags {external:skip cluster} overrides {bind ::1}} {
            test "Jobs over IPv6" {
                moves_under {} {
                    assert_equal {::1 ::1} [list [lindex [connections_to 1 [node_port 0]] 0 0] [lindex [connections_to 1 [node_port 0]] 0 2]]
                }
                assert_error "MOVED 5 ::1:[node_port 1]" {R 0 get [key_in 5 live]}
                # What names a node is readable.
                failpoint 1 target_before_accept fail
                assert_error "*the target [node_id 1] (*::1*:[node_port 1]) refuses*" {migrate 0 1 7 7}
                failpoint 1 target_before_accept off
            }
        }
    }
}

set ::address [get_nonloopback_addr]
if {$::address eq "" || [catch {close [socket -server accept -myaddr $::address 0]}]} {
    test "NOTE: no address but loopback on this machine: protected-mode is not tested" {}
} else {
    at_address $::address {
        start_cluster 2 0 [list tags {external:skip cluster} overrides [list bind $::address protected-mode no]] {
            test "protected-mode keeps a job out, as it does a replica, and says so; with a password it does not matter" {
                fresh
                with_config {1 {protected-mode yes}} {
                    assert_error "*the target*refuses: *protected mode*" {migrate 0 1 5 6}
                }
                with_config {0 {protected-mode yes}} {
                    set id [migrate 0 1 5 6]
                    wait_failed 1 $id "cannot attach to the source: *protected mode*"
                }
                moves_under {0 {requirepass secret protected-mode yes} 1 {requirepass other protected-mode yes}} {
                    assert_equal $::address [lindex [connections_to 1 [node_port 0]] 0 2]
                }
            }
        }
    }
}
