// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/baton-epp/baton/manifests/envoy"
)

// Ports, counted from the first one.
const (
	listenPort      = 0  // Envoy, for clients
	adminPort       = 1  // Envoy's admin interface
	eppPort         = 2  // Baton's ext_proc
	healthPort      = 3  // Baton's gRPC health
	metricsPort     = 4  // Baton's metrics and debug interface
	firstEnginePort = 10 // simulated model servers, one after the other
	engineCount     = 5
)

const readyLimit = 60 * time.Second

// A stack is everything the demo runs.
type stack struct {
	o       options
	http    *http.Client
	super   *supervisor
	engines []engine
}

// portsFree reports the first port that is taken.
func portsFree(ctx context.Context, o options, offsets ...int) error {
	for _, offset := range offsets {
		port := o.port(offset)
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", loopback(port))
		if err != nil {
			return fmt.Errorf("port %d is taken: end what listens there, or choose other ports with DEMO_PORT_BASE=%d", port, o.PortBase+1000)
		}
		l.Close()
	}
	return nil
}

func loopback(port int) string {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(port)).String() //nolint:gosec // checked with the options
}

func stackPorts(o options) []int {
	ports := []int{listenPort, adminPort, eppPort, healthPort, metricsPort}
	if o.VLLM == "" {
		for i := range engineCount {
			ports = append(ports, firstEnginePort+i)
		}
		return ports
	}
	return append(ports, vllmPorts()...)
}

// up starts the model servers, Baton and Envoy, each when the one before answers. say tells of each step.
func (s *stack) up(ctx context.Context, say func(format string, args ...any)) error {
	if err := portsFree(ctx, s.o, stackPorts(s.o)...); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(s.o.Dir, endpointsFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("old endpoints: %w", err)
	}
	if err := s.startEngines(ctx, say); err != nil {
		return err
	}
	say("Starting baton serve ...")
	if err := s.startBaton(ctx); err != nil {
		return err
	}
	say("Starting Envoy ...")
	if err := s.startEnvoy(ctx); err != nil {
		return err
	}
	return s.super.until(ctx, "the first answer through Envoy", readyLimit, func(ctx context.Context) error {
		return s.ok(ctx, s.envoyURL("/v1/models"))
	})
}

func (s *stack) startEngines(ctx context.Context, say func(format string, args ...any)) error {
	if s.o.VLLM != "" {
		say("Starting two vLLM servers (half a minute or more) ...")
		return s.startVLLM(ctx)
	}
	say("Starting %d simulated model servers ...", engineCount)
	if err := s.super.start(ctx, simulated(s.o)); err != nil {
		return err
	}
	return s.super.until(ctx, "the start of the simulated model servers", readyLimit, func(ctx context.Context) (err error) {
		if s.engines, err = readEngines(s.o.Dir); err != nil {
			return err
		}
		for _, e := range s.engines {
			if err := s.ok(ctx, e.url("/health")); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *stack) startBaton(ctx context.Context) error {
	// In the run folder the configuration finds the endpoints of this run, whatever else runs on the machine.
	config, err := os.ReadFile(s.o.Config)
	if err != nil {
		return fmt.Errorf("baton's configuration: %w", err)
	}
	file := filepath.Join(s.o.Dir, "epp.yaml")
	if err := os.WriteFile(file, config, 0o600); err != nil { //nolint:gosec // the run folder is the user's choice
		return fmt.Errorf("baton's configuration: %w", err)
	}
	err = s.super.start(ctx, command{
		Name: "baton",
		Path: s.o.Baton,
		Args: []string{
			"serve", "--config-file", file, "--bind-address", "127.0.0.1", "--secure-serving=false", "--enable-debug", "--drain-delay", "0s",
			"--grpc-port", s.portText(eppPort), "--grpc-health-port", s.portText(healthPort), "--metrics-port", s.portText(metricsPort),
		},
	})
	if err != nil {
		return err
	}
	return s.super.until(ctx, "Baton's first look at all model servers", readyLimit, func(ctx context.Context) error {
		var seen []endpointState
		if err := getJSON(ctx, s.http, s.debugURL()+"/debug/endpoints", &seen); err != nil {
			return err
		}
		ready := 0
		for _, e := range seen {
			if e.Ready && e.Fresh {
				ready++
			}
		}
		if ready < len(s.engines) {
			return fmt.Errorf("%d of %d are ready", ready, len(s.engines))
		}
		return nil
	})
}

func (s *stack) startEnvoy(ctx context.Context) error {
	v := envoy.Values{ListenPort: s.o.port(listenPort), AdminPort: s.o.port(adminPort), EPPPort: s.o.port(eppPort)}
	for _, e := range s.engines {
		v.Endpoints = append(v.Endpoints, e.Addr)
	}
	config, err := envoy.Render(envoy.QuietOverrideHost, v)
	if err != nil {
		return err
	}
	file := filepath.Join(s.o.Dir, "envoy.yaml")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return fmt.Errorf("envoy configuration: %w", err)
	}
	err = s.super.start(ctx, command{
		Name: "envoy",
		Path: s.o.Envoy,
		// Hot restart would take a machine-wide name, which another Envoy may hold.
		Args: []string{"-c", file, "--disable-hot-restart", "--log-level", "warning", "--concurrency", strconv.Itoa(min(2, runtime.NumCPU()))},
	})
	if err != nil {
		return err
	}
	return s.super.until(ctx, "the start of Envoy", readyLimit, func(ctx context.Context) error {
		return s.ok(ctx, "http://"+loopback(s.o.port(adminPort))+"/ready")
	})
}

// ok asks for url and wants a 200.
func (s *stack) ok(ctx context.Context, url string) error {
	resp, err := get(ctx, s.http, url, "*/*")
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func (s *stack) envoyURL(path string) string {
	return "http://" + loopback(s.o.port(listenPort)) + path
}
func (s *stack) debugURL() string           { return "http://" + loopback(s.o.port(metricsPort)) }
func (s *stack) portText(offset int) string { return strconv.Itoa(s.o.port(offset)) }
func (s *stack) client() *client {
	return &client{http: s.http, base: s.envoyURL(""), model: s.o.model()}
}

// ledger asks the model servers what became of the KV blocks.
func (s *stack) ledger(ctx context.Context) (ledger, error) {
	if s.o.VLLM != "" {
		return vllmLedger(ctx, s.http, s.engines)
	}
	return simulatedLedger(ctx, s.http, s.engines)
}

// settled waits, a short while, until nothing is held any more, and returns the last ledger.
func (s *stack) settled(ctx context.Context) (ledger, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		l, err := s.ledger(ctx)
		if err != nil || l.Held == 0 || !wait(ctx, 200*time.Millisecond) {
			return l, err
		}
	}
}
