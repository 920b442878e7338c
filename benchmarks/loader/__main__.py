from benchmarks.loader.runs import main

if __name__ == "__main__":
    main()
