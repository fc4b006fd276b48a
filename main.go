package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the Makefile's -ldflags.
var version = "dev"

func logFlags(fs *flag.FlagSet) {
	fs.String("log-level", "info", "`level` of the log: error, warning, info, debug or trace")
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == "operator":
		err = runOperator(ctx, os.Args[2:])
	default:
		err = fmt.Errorf("usage: cnpg-barman-s3 operator")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
