// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/baton-epp/baton/app"
)

// serveFlags are the flags that need more than a copy into app.Options.
type serveFlags struct {
	options                         app.Options
	verbosity                       int
	zapEncoder, clientCA            string
	metricsAuth, leaderElection     bool
	recvSize, sendSize              string
	kubernetes                      map[string]*string // flags that only the Kubernetes source will use
	emitScores, grpcMetrics, tracer bool
}

func newServe() *cobra.Command {
	f := &serveFlags{options: app.DefaultOptions(), kubernetes: map[string]*string{}}
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Answer a gateway's ext_proc calls: the Endpoint Picker",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			options, err := f.resolve(cmd.Flags())
			if err != nil {
				return err
			}
			a, err := app.New(*options)
			if err != nil {
				return err
			}
			return a.Run(cmd.Context())
		},
	}
	cmd.Flags().SortFlags = false
	f.register(cmd.Flags())
	return cmd
}

func (f *serveFlags) register(fs *pflag.FlagSet) {
	o := &f.options
	fs.StringVar(&o.ConfigFile, "config-file", "", "EndpointPickerConfig to read; the disaggregation section is read again when it changes")
	fs.StringVar(&o.EndpointsFile, "endpoints-file", "", "file of endpoints to watch, in place of dataLayer.discovery; with it no configuration is needed")
	fs.StringVar(&o.ConfigText, "config-text", "", "EndpointPickerConfig as text")
	fs.StringVar(&o.BindAddress, "bind-address", "", "IP address to listen on (default all)")
	fs.IntVar(&o.GRPCPort, "grpc-port", o.GRPCPort, "ext_proc port (0 = a free one, -1 = none)")
	fs.StringVar(&o.GRPCSocket, "grpc-socket", "", "Unix socket for ext_proc, without TLS")
	fs.IntVar(&o.HealthPort, "grpc-health-port", o.HealthPort, "gRPC health port (-1 = none; health is on the ext_proc port too)")
	fs.IntVar(&o.MetricsPort, "metrics-port", o.MetricsPort, "Prometheus metrics port (-1 = none)")
	fs.BoolVar(&o.SecureServing, "secure-serving", o.SecureServing, "TLS on the ext_proc port, self-signed unless --cert-path is set")
	fs.StringVar(&o.CertPath, "cert-path", "", "folder with tls.crt and tls.key")
	fs.BoolVar(&o.CertReload, "enable-cert-reload", false, "read --cert-path again when its content changes")
	fs.StringVar(&o.TLSMinVersion, "tls-min-version", "", "VersionTLS12 (default) or VersionTLS13")
	fs.StringSliceVar(&o.TLSCipherSuites, "tls-cipher-suites", nil, "TLS 1.2 cipher suites (default Go's choice)")
	fs.StringVar(&o.MetricsCertDir, "metrics-cert-dir", "", "folder with tls.crt and tls.key for the metrics port (default plain HTTP)")
	fs.BoolVar(&f.metricsAuth, "metrics-endpoint-auth", false, "authenticate the metrics port by TokenReview (default on with a Kubernetes source only)")
	fs.BoolVar(&o.EnableDebug, "enable-debug", false, "serve /debug/decisions and /debug/endpoints on the metrics port")
	fs.BoolVar(&o.EnablePprof, "enable-pprof", false, "serve /debug/pprof on the metrics port")
	fs.StringVar(&o.MetricsNames, "metrics-names", o.MetricsNames, "names of shared metrics: llm-d or gie")
	fs.DurationVar(&o.RefreshMetricsInterval, "refresh-metrics-interval", o.RefreshMetricsInterval, "lower bound of the adaptive scrape interval")
	fs.DurationVar(&o.MetricsStaleness, "metrics-staleness-threshold", o.MetricsStaleness, "age beyond the scrape interval at which metrics are unknown")
	fs.DurationVar(&o.DrainTimeout, "drain-timeout", o.DrainTimeout, "time for running requests after SIGTERM")
	fs.DurationVar(&o.DrainDelay, "drain-delay", o.DrainDelay, "time between NOT_SERVING and refusing new streams")
	fs.StringVar(&f.recvSize, "grpc-max-recv-msg-size", "", "largest message received, such as 80Mi (default fits limits.maxBodyBytes)")
	fs.StringVar(&f.sendSize, "grpc-max-send-msg-size", "", "largest message sent (default fits limits.maxBodyBytes)")
	fs.BoolVar(&o.DisableSubsetFilter, "disable-endpoint-subset-filter", false, "ignore the gateway's subset hint")
	fs.StringVar(&o.PoolName, "pool-name", "", "InferencePool; with file discovery only a metric label")
	fs.BoolVar(&f.tracer, "tracing", app.TracingConfigured(), "spans by OTLP (default on when OTEL_EXPORTER_OTLP_ variables are set)")
	fs.IntVarP(&f.verbosity, "v", "v", 2, "log verbosity; above 2 adds one line per request")
	fs.StringVar(&f.zapEncoder, "zap-encoder", "console", "log format: console or json")
	f.registerAccepted(fs)
}

// registerAccepted are flags of llm-d's picker that mean nothing here, or not yet: they are taken so that a command line
// moves over, and what they would change is said.
func (f *serveFlags) registerAccepted(fs *pflag.FlagSet) {
	for _, name := range []string{"pool-group", "pool-namespace", "endpoint-selector", "endpoint-target-ports", "kubeconfig"} {
		f.kubernetes[name] = fs.String(name, "", "used by the Kubernetes source, which is not built yet")
	}
	fs.BoolVar(&f.leaderElection, "ha-enable-leader-election", false, "accepted: all replicas of Baton are active and ready")
	fs.Bool("allow-experimental-plugins", false, "accepted: Baton has no such gate")
	fs.Bool("health-checking", false, "accepted: health is on the ext_proc port in any case")
	fs.BoolVar(&f.emitScores, "emit-endpoint-scores", false, "not built yet")
	fs.BoolVar(&f.grpcMetrics, "enable-grpc-stream-metrics", false, "accepted: baton_extproc_ metrics are always there")
	fs.Duration("refresh-prometheus-metrics-interval", 0, "accepted: pool gauges are computed when they are read")
	fs.StringVar(&f.clientCA, "metrics-client-ca-file", "", "not built yet")
	for _, name := range []string{"zap-log-level", "zap-stacktrace-level", "zap-time-encoding"} {
		fs.String(name, "", "accepted: use -v and --zap-encoder")
	}
	fs.Bool("zap-devel", false, "accepted: use -v and --zap-encoder")
}

// resolve turns flags into options; every problem is reported.
func (f *serveFlags) resolve(fs *pflag.FlagSet) (*app.Options, error) {
	o := f.options
	var errs []error
	for name, to := range map[string]struct {
		text string
		out  *int
	}{"grpc-max-recv-msg-size": {f.recvSize, &o.MaxRecvMsgSize}, "grpc-max-send-msg-size": {f.sendSize, &o.MaxSendMsgSize}} {
		if to.text == "" {
			continue
		}
		n, err := messageSize(to.text)
		if err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", name, err))
		}
		*to.out = n
	}
	if fs.Changed("metrics-endpoint-auth") {
		o.MetricsAuth = &f.metricsAuth
	}
	if f.emitScores {
		errs = append(errs, errors.New("--emit-endpoint-scores: not built yet"))
	}
	if f.clientCA != "" {
		errs = append(errs, errors.New("--metrics-client-ca-file: not built yet; bind the metrics port to loopback or guard it by a network policy"))
	}
	if f.zapEncoder != "console" && f.zapEncoder != "json" {
		errs = append(errs, fmt.Errorf("--zap-encoder: %q, must be console or json", f.zapEncoder))
	}
	o.Tracing, o.Version = f.tracer, version
	o.Logger = logger(f.verbosity, f.zapEncoder == "json")
	for name, value := range f.kubernetes {
		if *value != "" {
			o.Logger.Warn("flag is for the Kubernetes source, which is not built yet; it changes nothing", slog.String("flag", "--"+name))
		}
	}
	return &o, errors.Join(errs...)
}

// messageSize reads a quantity, also with a trailing B (10MiB), as llm-d does.
func messageSize(text string) (int, error) {
	trimmed := text
	if len(text) > 1 && text[len(text)-1] == 'B' {
		trimmed = text[:len(text)-1]
	}
	q, err := resource.ParseQuantity(trimmed)
	if err != nil {
		return 0, fmt.Errorf("%q is not a size such as 64Mi", text)
	}
	if n := q.Value(); n > 0 && n < 1<<31 {
		return int(n), nil
	}
	return 0, fmt.Errorf("%q, must be between 1 and 2Gi", text)
}
