// redisc.go -- golang-github-mna-redisc, a client of a cluster on redigo, see work.js.
//
// Its connections that retry know single commands only: for a pipeline or a transaction
// an application has to follow the redirections itself, so there is nothing to test.
//
// SPDX-License-Identifier: AGPL-3.0-only
package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/mna/redisc"
)

const (
	turn   = 20
	pause  = 2 * time.Millisecond
	heard  = 10 * time.Second
	tries  = 5
	delay  = 100 * time.Millisecond
	script = "local n = redis.call('incr', KEYS[1]) redis.call('rpush', KEYS[2], n) return n"
)

var (
	printing sync.Mutex
	stopped  = make(chan struct{})
)

func say(words ...interface{}) {
	printing.Lock()
	defer printing.Unlock()
	fmt.Println(words...)
}

func isStopped() bool {
	select {
	case <-stopped:
		return true
	default:
		return false
	}
}

func pool(address string, options ...redis.DialOption) (*redis.Pool, error) {
	return &redis.Pool{
		MaxIdle: 4,
		Dial:    func() (redis.Conn, error) { return redis.Dial("tcp", address, options...) },
	}, nil
}

// At the owner of the key's slot.
func call(cluster *redisc.Cluster, key, command string, args ...interface{}) (interface{}, error) {
	plain := cluster.Get()
	defer plain.Close()
	if err := redisc.BindConn(plain, key); err != nil {
		return nil, err
	}
	conn, err := redisc.RetryConn(plain, tries, delay)
	if err != nil {
		return nil, err
	}
	return conn.Do(command, args...)
}

// n were acknowledged: one more.
var steps = map[string]func(cluster *redisc.Cluster, tag string, n int) error{
	"values": func(cluster *redisc.Cluster, tag string, n int) error {
		if _, err := call(cluster, tag, "SET", "{"+tag+"}value", n+1); err != nil {
			return err
		}
		return expect(n + 1)(redis.Int(call(cluster, tag, "GET", "{"+tag+"}value")))
	},
	"scripts": func(cluster *redisc.Cluster, tag string, n int) error {
		return expect(n + 1)(redis.Int(call(cluster, tag, "EVAL", script, 2, "{"+tag+"}counter", "{"+tag+"}log")))
	},
}

func expect(wanted int) func(got int, err error) error {
	return func(got int, err error) error {
		if err == nil && got != wanted {
			err = fmt.Errorf("answered %d instead of %d", got, wanted)
		}
		return err
	}
}

func work(cluster *redisc.Cluster, kind, tag string) {
	n := 0
	for i := 1; !isStopped(); i++ {
		if err := steps[kind](cluster, tag, n); err != nil {
			say("error", kind, tag, strings.ReplaceAll(err.Error(), "\n", " "))
			return // what the server has now is not known
		}
		n++
		if i%turn == 0 {
			say("turn")
		}
		time.Sleep(pause)
	}
	say("acknowledged", kind, tag, n)
}

// A channel of the whole cluster, heard at whatever node the library chooses.
func messages(cluster *redisc.Cluster, tag string) {
	channel, last := "{"+tag+"}channels", make(chan int, 1000000)
	listener, ended := redis.PubSubConn{Conn: cluster.Get()}, make(chan struct{})
	fail := func(err error) { say("error messages", tag, strings.ReplaceAll(err.Error(), "\n", " ")) }
	if err := listener.Subscribe(channel); err != nil {
		fail(err)
		return
	}
	defer func() { // the pool takes it back when nothing is subscribed to
		listener.Unsubscribe()
		<-ended
		listener.Close()
	}()
	go func() {
		defer close(ended)
		for {
			switch message := listener.Receive().(type) {
			case redis.Message:
				n, _ := redis.Int(message.Data, nil)
				last <- n
			case redis.Subscription:
				if message.Count == 0 {
					return
				}
			case error:
				close(last)
				return
			}
		}
	}()
	send := func(n int) bool {
		_, err := call(cluster, tag, "PUBLISH", channel, n)
		if err != nil {
			fail(err)
		}
		return err == nil
	}
	n := 0
	for !isStopped() {
		if n++; !send(n) {
			return
		}
		if n%turn == 0 {
			say("turn")
		}
		time.Sleep(pause)
	}
	end := time.After(heard)
	for wanted := n + 1; ; {
		if n++; !send(n) {
			return
		}
	drain:
		for {
			select {
			case got, open := <-last:
				if open && got < wanted {
					continue
				}
				if !open {
					say("silent channels", tag)
				} else {
					say("acknowledged channels", tag, n)
				}
				return
			case <-time.After(10 * time.Millisecond):
				break drain
			case <-end:
				say("silent channels", tag)
				return
			}
		}
	}
}

func main() {
	say("library redisc", os.Getenv("REDISC_VERSION"))
	say("without pipelines and transactions that follow redirections")
	say("without sharded channels")
	cluster := &redisc.Cluster{StartupNodes: strings.Split(os.Args[1], ","), CreatePool: pool}
	if err := cluster.Refresh(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	say("ready")
	var all sync.WaitGroup
	for _, word := range os.Args[2:] {
		parts := strings.SplitN(word, ":", 2)
		kind, tag := parts[0], parts[1]
		if kind != "messages" && steps[kind] == nil {
			continue
		}
		all.Add(1)
		go func() {
			defer all.Done()
			if kind == "messages" {
				messages(cluster, tag)
			} else {
				work(cluster, kind, tag)
			}
		}()
	}
	io.Copy(io.Discard, os.Stdin)
	close(stopped)
	all.Wait()
	cluster.Close()
	say("done")
}
